"""The studies of appendix/studies.py: what each claims, what it runs, which difference matters.

Claims, arms and smallest differences were written before the runs that they are judged by, and no
study is tuned until it agrees with its paper. After a first run `spurious-rewards` gained an arm,
and `behaviours` a longer warm start. Limits were added to afterwards. The settings are those of
train_rl.py. The smallest difference that matters (`least`) is a share unless the figure is a count;
it is five points where a paper reports a large effect, two or three where it reports a small one,
and twenty where a control should take away what the policy learned.
"""
from dataclasses import dataclass, field

# The seeds: three. Where these left the first claim of a study open, two more were run, once.
THREE = (0, 1, 2)
FIVE = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Claim:
    """A comparison that a verdict is about.

    figure: a path into summary.json of a run (or into that of an evaluation, by its name), "a - b"
    or "a / b".
    """
    says: str
    arm: str                    # the arm that the claim speaks for
    than: str = ""              # the arm it is compared with; "": with 0
    figure: str = "accuracy_after"
    least: float = 0.03         # the smallest difference that matters
    falls: bool = False         # the claim says that the figure is lower
    handicap: float = 0.0       # added to the difference, where the claim says "nearly as good"


@dataclass(frozen=True)
class Study:
    """A claim and the runs that test it. The first of `claims` is the one of the README."""
    name: str
    group: str                  # heading of the page
    claim: str                  # in one sentence
    source: str                 # who made it: paper, table
    arms: dict                  # {label: settings "FIELD=VALUE ..."}
    shared: str                 # flags of train_rl.py for all runs
    claims: tuple
    limits: str                 # what this world cannot say
    read: str                   # where to look in the code and in the papers
    evaluate: dict = field(default_factory=dict)    # {name: flags of evaluate.py} per checkpoint
    show: tuple = ()            # further figures of the table
    seeds: tuple = THREE
    picture: str = ""           # a file of appendix/studies besides the curves
    picture_shows: str = ""


VIGORL = "ViGoRL"
UNIVG = "UniVG-R1"
FIELD = "The field"

# Traces from the ground truth of the toy world, which look at random objects or guess, make a warm
# start in seconds. Studies of the warm start itself name their own.
ORACLE = "--traces oracle --sft-n 400"
# Half as many prompts per step as by default: what differs shows before the task is solved.
SMALL = "--num-prompts 8 --blind-prompts 1"
# GSPO with the clips of its paper.
GSPO = "loss=gspo clip_low=3e-4 clip_high=4e-4 aggregate=sequence"

STUDIES = [
    Study(
        "grounding", VIGORL,
        "Naming a point with each step of the reasoning makes RL end higher.",
        "ViGoRL (2505.23678), table 4: without grounding SAT-2 falls from 62.9 to 58.7, BLINK from "
        "48.5 to 45.4. 2605.31096 calls grounding decorative, 2606.16122 says the opposite.",
        arms={
            "relation, points": "task=relation recipe=vigorl",
            "relation, no points": "task=relation recipe=vigorl-ungrounded sft_target=ungrounded",
            "clicks, points": "task=point recipe=vigorl",
            "clicks, no points": "task=point recipe=vigorl-ungrounded sft_target=ungrounded",
        },
        shared=f"{ORACLE} --loss grpo --kl-coef 0 --group-size 8 --steps 40",
        claims=(
            Claim("On `relation`, points in the reasoning make RL end higher.",
                  "relation, points", "relation, no points"),
            Claim("On `point`, too.", "clicks, points", "clicks, no points"),
            Claim("The reasoning is used: told to answer at once, the policy that was trained "
                  "with points on `relation` is right less often.",
                  "relation, points", figure="accuracy_after - at_once.accuracy", least=0.05),
        ),
        evaluate={"at_once": "--zoom=off"},
        show=("at_once.accuracy",),
        limits="The tiny base was taught to point by its pretraining, and its reasoning has no "
               "words but names and places. Told to answer at once (its turn is opened with "
               "`data.FORCE`) it loses the whole thought, not only the points; and a drill of the "
               "pretraining (`lessons.zoom_drill`) put random options after that very sentence, "
               "so a part of what it loses was taught. The prompt asks for points in all arms. A "
               "click is a point itself, so on `point` points in the reasoning have little to "
               "add. `relation` has two options: without points the policy stays at chance, and "
               "told to answer at once it falls below, so most of those answers are not even "
               "guesses; some policies write their thought inside the answer.",
        read="`rewards.vigorl` and `rewards.vigorl_ungrounded`; `trace_tools.retarget`; "
             "`zoom_rollout.RolloutConfig.opening`."),
    Study(
        "traces", VIGORL,
        "Traces found by tree search are a better start for RL than single paths.",
        "ViGoRL, table 4: linear rollouts in place of search give 63.3 against 62.9 on SAT-2, "
        "46.2 against 48.5 on BLINK; answers alone before RL 63.3 and 48.6; without grounding "
        "58.7, 45.4.",
        arms={
            "search": "traces=mcts recipe=vigorl",
            "single paths": "traces=path recipe=vigorl",
            "ungrounded": "traces=mcts sft_target=ungrounded recipe=vigorl-ungrounded",
            "answers alone": "traces=mcts sft_target=answer recipe=vigorl-ungrounded",
        },
        shared="--task relation --sft-n 400 --loss grpo --kl-coef 0 --group-size 8 --steps 40",
        claims=(
            Claim("Search is worth more than single paths.", "search", "single paths"),
            Claim("Search is worth more than the same traces without their points.",
                  "search", "ungrounded"),
            Claim("Search is worth more than the answers of its traces alone.",
                  "search", "answers alone"),
        ),
        limits="The teacher is the tiny base itself, not a model of 72B, and there are equally "
               "many traces in all arms: what search costs, and that it solves more questions, "
               "does not count here (`python -m appendix.speed search` measures that). A policy "
               "that learned answers alone wrote no thought in 40 steps, so the format part of "
               "its reward stayed 0.",
        read="`appendix/tree_search.py`; `train_sft.find_traces`; `trace_tools.retarget`."),
    Study(
        "zoom", VIGORL,
        "Zooming helps by what the crops show, not by further turns.",
        "ViGoRL, table 3 (V*: 81.2 with zooms, 79.1 in one turn); the controls are those of "
        "VisualNeedle (2605.26380), which paints crops black.",
        arms={
            "zoom": "",
            "crops of the fed copy": "crop_from=seen",
            "larger overview": "task=search max_pixels=50176 max_zooms=0 recipe=vigorl",
        },
        shared=f"{ORACLE} --loss grpo --kl-coef 0 --group-size 8 --steps 60 --eval-wrong",
        claims=(
            Claim("With crops of another object the policy is right less often.",
                  "zoom", figure="accuracy_after - accuracy_wrong_crop", least=0.2),
            Claim("With black crops, too.",
                  "zoom", figure="accuracy_after - accuracy_black_crop", least=0.2),
            Claim("If it may not zoom, too.",
                  "zoom", figure="accuracy_after - accuracy_no_zoom", least=0.2),
            Claim("Crops of the stored image are worth more than crops of the shrunken copy that "
                  "the model was fed.", "zoom", "crops of the fed copy", least=0.2),
        ),
        show=("accuracy_no_zoom", "accuracy_black_crop", "accuracy_wrong_crop",
              "zooms_per_episode"),
        limits="The world is made so that patterns vanish in the overview, so without zooms and "
               "with black crops the policy should fall to chance; if it did not, something would "
               "leak. With wrong crops it sees another object, and may call again. That zooming "
               "beats the same number of image tokens spent on a larger overview cannot be posed "
               "honestly: the arm `larger overview` sees the scene at twice the size, 64 tokens, "
               "as many as an overview and three crops, but the eyes of the tiny base are frozen "
               "in RL and have never seen a pattern at that size. So its row stands in the table "
               "without a claim. Its traces have no crops and guess the option. The warm start of "
               "the arm with crops of the fed copy showed crops of the stored image, as that of "
               "`zoom`. After RL this arm no longer zooms, so its controls with black and wrong "
               "crops compare equal episodes.",
        read="`zoom_rollout.crop` and `env_step`; `evidence.elsewhere`; `evaluate.MODES`."),
    Study(
        "distinct-points", VIGORL,
        "Without the bonus for distinct points the policy stops looking again.",
        "ViGoRL, table 3: V* falls from 81.2 to 78.0, and the policy answers after one turn.",
        arms={
            "warm start": "steps=0",
            "no bonus": "distinct_bonus=0",
            "bonus": "distinct_bonus=0.2",
        },
        shared=f"{ORACLE} --task search --difficulty hard --recipe vigorl-zoom --loss grpo "
               "--kl-coef 0 --blind-prompts 2 --steps 60",
        seeds=FIVE,
        claims=(
            Claim("Without the bonus the policy looks less often after RL than before.",
                  "no bonus", "warm start", figure="zooms_per_episode", falls=True, least=0.3),
            Claim("With the bonus it looks more often than without.",
                  "bonus", "no bonus", figure="zooms_per_episode", least=0.3),
            Claim("With the bonus it is right more often than without.", "bonus", "no bonus"),
        ),
        show=("zooms_per_episode", "saw", "accuracy_no_zoom"),
        limits="No question of this world needs two zooms: one look at the right place answers it, "
               "and only a policy that looked at the wrong place first gains by a second look. So "
               "that the policy looks again can be tested here; what that is worth on V*, whose "
               "second kind of question compares two things, cannot. Where the policy learns, it "
               "ends at one zoom with the bonus and without; in seed 2 it learns neither way: one "
               "policy stops zooming, the other zooms for the bonus.",
        read="`rewards.distinct_bonus`, and the table of bounds in `rewards.vigorl_zoom`."),
    Study(
        "behaviours", VIGORL,
        "The policy looks at more regions after RL (and verifies and backtracks more).",
        "ViGoRL, section A6: 3.5 regions, 0.39 verifications and 0.47 backtrackings per trace, "
        "against 1.8, 0.17 and 0 for GRPO without grounding.",
        arms={
            "warm start": "steps=0",
            "after RL": "steps=60",
        },
        shared="--task relation --recipe vigorl --traces mcts --sft-n 400 --sft-corrected 1 "
               "--sft-epochs 8 --loss grpo --kl-coef 0 --group-size 8 --max-new-tokens 144",
        claims=(
            Claim("More regions are named.", "after RL", "warm start",
                  figure="behaviour.regions", least=0.2),
            Claim("More often it returns to a region, or says that it checks.",
                  "after RL", "warm start", figure="behaviour.verification", least=0.05),
            Claim("More often it turns to another region after words of correction.",
                  "after RL", "warm start", figure="behaviour.backtracking", least=0.05),
        ),
        evaluate={"behaviour": "--zoom=on"},
        show=("behaviour.subgoals",),
        limits="Behaviours are counted by rules on words and points (`appendix/analysis.py`), and "
               "the tiny model knows few words: of correction one phrase, of subgoals none, so "
               "there is no claim about those. Corrected chains of the warm start bring the "
               "backtracking; it takes the tiny model eight passes to learn to spell their words. "
               "(Two trials with one pass, not shown, had no backtracking before or after RL.) "
               "The paper compares with GRPO without grounding, this study with its own warm "
               "start. A question about a relation names two things, and RL settles on two "
               "regions; more could not be expected.",
        read="`analysis.behaviour`; `appendix/chains.py` on corrected chains."),

    Study(
        "both-stages", UNIVG,
        "RL after fine-tuning is better than fine-tuning alone (and than RL alone).",
        "UniVG-R1 (2505.14231), table 4: 69.00 after fine-tuning alone, 72.64 after both "
        "(MIG-Bench, Acc@0.5).",
        arms={
            "fine-tuning alone": "steps=0",
            "RL alone": "traces=",
            "both": "",
        },
        shared=f"{SMALL} --recipe univg-r1 --sft-n 600 --steps 100",
        claims=(
            Claim("Both are better than fine-tuning alone.", "both", "fine-tuning alone",
                  least=0.05),
            Claim("Both are better than RL alone.", "both", "RL alone", least=0.05),
        ),
        show=("mean_iou_after", "levels.hard.accuracy_after"),
        limits="Traces come from the ground truth of the toy world, half of them guesses on "
               "purpose, where the paper has a teacher's reasoning. The KL term and the weight "
               "`exp` are on, as in the paper. Fine-tuning alone gets no more traces or epochs in "
               "place of RL. A run of RL alone ends if no episode of its first step has any "
               "success; then the comparison stays open. Half of the traces are guesses, so the "
               "warm start makes the base worse than it was: the first claim compares with that.",
        read="`appendix/recipes.py`; `train_sft.oracle_of_boxes`; "
             "`rl_run.stop_if_nothing_succeeds`."),
    Study(
        "difficulty", UNIVG,
        "Prompts that are solved less often should count more.",
        "UniVG-R1, table 4: 70.65 without and 72.64 with the weight `exp`; it finds that all "
        "variants help. MaxRL (2602.02710) weights by 1/m in the limit; m: the group's mean IoU.",
        arms={
            "none": "difficulty_weight=none",
            "exp": "difficulty_weight=exp",
            "exp, normalised": "difficulty_weight=exp difficulty_normalize=true",
            "power": "difficulty_weight=power",
            "log": "difficulty_weight=log",
            "1/m": "difficulty_weight=inverse",
            "m": "difficulty_weight=easy",
        },
        shared=f"{SMALL} --recipe univg-r1 --sft-n 600 --kl-coef 0 --steps 60",
        seeds=FIVE,
        claims=(
            Claim("`exp` is better than no weight.", "exp", "none", least=0.02),
            Claim("`exp` scaled to mean 1 is better than no weight.", "exp, normalised", "none",
                  least=0.02),
            Claim("`power` is better than no weight.", "power", "none", least=0.02),
            Claim("`log` is better than no weight.", "log", "none", least=0.02),
            Claim("1/m is better than no weight.", "1/m", "none", least=0.02),
            Claim("m, which favours the easy, is worse than no weight.", "m", "none", least=0.02,
                  falls=True),
        ),
        show=("mean_iou_after", "levels.easy.accuracy_after", "levels.hard.accuracy_after"),
        picture="weights.svg",
        picture_shows="each weight over the mean accuracy of the group, as a share of its largest",
        limits="In the paper the weight is worth two points. A few seeds of a tiny model scatter "
               "by more than that, so open verdicts are likely. The paper has a KL term beside "
               "the weights; here there is none, because a larger weight would also make that "
               "term smaller in proportion. Adam divides by the size of the gradient, so a factor "
               "on all advantages alone should change little.",
        read="`grpo.difficulty_weights`; `train_rl.prompt_weights`."),
    Study(
        "soft-iou", UNIVG,
        "The IoU itself is a better reward than the question whether it reaches 0.5.",
        "UniVG-R1 rewards the IoU plus the format; a reward with a threshold stands in its code, "
        "commented out.",
        arms={
            "IoU + format": "reward_parts=iou,format",
            "hit + format": "reward_parts=hit,format",
            "IoU": "reward_parts=iou",
            "hit": "reward_parts=hit",
        },
        shared=f"{SMALL} --recipe univg-r1 --sft-n 600 --difficulty-weight none --kl-coef 0 "
               "--steps 60",
        seeds=FIVE,
        claims=(
            Claim("The IoU is better than the hit, with the format part.",
                  "IoU + format", "hit + format"),
            Claim("The IoU is better than the hit, without it.", "IoU", "hit"),
            Claim("The format part helps.", "IoU + format", "IoU"),
            Claim("By the mean IoU, too, the IoU is better than the hit.",
                  "IoU + format", "hit + format", figure="mean_iou_after", least=0.02),
        ),
        show=("mean_iou_after", "levels.hard.accuracy_after"),
        limits="The first three claims are judged by Acc@0.5, which is the hit itself. The fourth "
               "is judged by the mean IoU, which is the very reward of the arm that it favours. "
               "The warm start writes nearly all answers in the right form, so the format part "
               "has little left to teach.",
        read="`rewards.univg_r1`; `rl_options.choose_parts`."),
    Study(
        "transfer", UNIVG,
        "What RL taught on boxes helps on frames of a video (and three more such pairs).",
        "UniVG-R1 reports zero-shot gains on four other benchmarks; 2603.15432 (Gym-V) finds that "
        "narrow training transfers badly.",
        arms={
            "boxes, before": "task=boxes recipe=univg-r1 difficulty=mixed steps=0",
            "boxes": "task=boxes recipe=univg-r1 difficulty=mixed steps=80",
            "video, before": "task=video recipe=univg-r1 difficulty=mixed steps=0",
            "video": "task=video recipe=univg-r1 difficulty=mixed steps=80",
            "search, before": "task=search recipe=vigorl-zoom steps=0",
            "search": "task=search recipe=vigorl-zoom steps=60",
            "relation, before": "task=relation recipe=vigorl-zoom steps=0",
            "relation": "task=relation recipe=vigorl-zoom steps=60",
        },
        shared=f"{ORACLE} {SMALL} --loss grpo --kl-coef 0 --distinct-bonus 0",
        claims=(
            Claim("RL on boxes helps on video frames.", "boxes", "boxes, before",
                  figure="video.accuracy"),
            Claim("RL on video frames helps on boxes.", "video", "video, before",
                  figure="boxes.accuracy"),
            Claim("RL on search helps on relations.", "search", "search, before",
                  figure="relation.accuracy"),
            Claim("RL on relations helps on search.", "relation", "relation, before",
                  figure="search.accuracy"),
        ),
        evaluate={name: f"--task={name}" for name in ("boxes", "video", "search", "relation")},
        limits="`find` is left out: its answers must name an image, a form that no other task "
               "teaches, so little could be read from it. A policy keeps the prompt it was "
               "trained with (`search` and `relation`: with the zoom tool). Patterns and sides "
               "are other words: the policy for relations answers nearly no question of `search`, "
               "before RL or after, and RL on `search` takes away most of what its warm start "
               "could do on relations. What boxes bring on frames is small beside RL on frames "
               "themselves (the arm `video`). The pretraining has taught boxes, in frames too, "
               "though not by these questions: the base is no stranger to what RL was not trained "
               "on. A part of what transfers may be the form of the answer.",
        read="`data.ASK`; `appendix/mixture.py` for training on two kinds at a time."),

    Study(
        "pass-at-k", FIELD,
        "RL reaches answers that the base does not reach in many tries.",
        "2511.00710 says so of mazes; 2504.13837 says the opposite: pass@k of the base is higher "
        "for large k, so RL only sharpens.",
        arms={
            "before RL": "steps=0",
            "after RL": "steps=100",
        },
        shared=f"{SMALL} --recipe univg-r1 --sft-n 600 --difficulty hard --kl-coef 0 --eval-n 100",
        seeds=FIVE,
        claims=(
            Claim("Pass@64 is higher after RL.", "after RL", "before RL",
                  figure="many.pass_at.64", least=0.02),
            Claim("Pass@64 is lower after RL.", "after RL", "before RL",
                  figure="many.pass_at.64", least=0.02, falls=True),
            Claim("Pass@1 is higher after RL.", "after RL", "before RL",
                  figure="many.pass_at.1", least=0.05),
        ),
        evaluate={"many": "--samples=64 --plain"},
        show=tuple(f"many.pass_at.{2 ** i}" for i in range(7)),
        picture="pass-at-k-curve.svg",
        picture_shows="pass@k before and after RL, by k on a logarithmic axis",
        limits="Boxes in hard scenes, because with four options one of 64 guesses is almost "
               "surely right. `Before` is the policy after the warm start, which is what RL "
               "begins with. A box that covers half of the right one can also be hit by chance; "
               "64 tries find some. Before RL 64 tries solve nearly all questions, so RL could "
               "gain little more there than the difference that matters.",
        read="`evaluate.pass_at_k`."),
    Study(
        "cold-start", FIELD,
        "A forced template does nearly as well as a warm start.",
        "MGPO (2507.05920) forces a tool call in the first turn and needs no warm start; DeepEyes "
        "(2505.14362) has none; DeepEyesV2 finds that RL without one fails to produce tool use.",
        arms={
            "warm start": "traces=oracle",
            "template": "template=true traces=",
            "neither": "traces=",
        },
        shared=f"{SMALL} --sft-n 400 --max-zooms 1 --steps 80",
        claims=(
            Claim("The template does nearly as well: at most five points less.",
                  "template", "warm start", handicap=0.05, least=0.0),
            Claim("With neither, RL ends lower than with a warm start.",
                  "neither", "warm start", falls=True, least=0.05),
            Claim("The template is better than nothing.", "template", "neither", least=0.05),
        ),
        show=("zooms_per_episode", "saw"),
        limits="The base has practised the form of a tool call in its pretraining, as "
               "instruction-tuned models have. All arms have the same number of RL steps, so the "
               "warm start comes on top. The policy of the template is measured with it, too. The "
               "template takes the place of the whole thought, and so of the words with which the "
               "warm start names the thing that it looks for: it calls nearly always, and seldom "
               "for the right place. Without either, two seeds end at 0 and one at the top.",
        read="`zoom_rollout.TEMPLATE` and `RolloutConfig.opening`."),
    Study(
        "spurious-rewards", FIELD,
        "Rewards without information about the right answer help, too.",
        "2506.10947: on MATH-500 Qwen2.5-Math-7B gains 29.1 points with true rewards, 21.4 with "
        "random ones, 13.8 with the format, 24.1 with wrong labels; other families gain little.",
        arms={
            "warm start": "steps=0",
            "true reward": "",
            "random": "control=random",
            "random, clipped": "control=random num_minibatches=4",
            "format": "control=format",
            "inverted": "control=inverted",
        },
        shared=f"{ORACLE} {SMALL} --steps 40",
        claims=(
            Claim("Random rewards help.", "random", "warm start"),
            Claim("Random rewards help if the clip acts (four updates per batch).",
                  "random, clipped", "warm start"),
            Claim("Format rewards help.", "format", "warm start"),
            Claim("Inverted rewards help.", "inverted", "warm start"),
            Claim("True rewards help.", "true reward", "warm start"),
        ),
        show=("zooms_per_episode", "saw"),
        limits="The paper explains the gains by what pretraining left behind and the clip "
               "amplifies. With one update per batch nothing is clipped; one arm has four. The "
               "tiny base has the skills that the task needs (it points, and reads a crop), but "
               "has not put them together. Inverted rewards pay well-formed answers that are not "
               "right, where the paper pays those that agree with a wrong label.",
        read="`rl_options.replace_by_control`."),
    Study(
        "tool-use", FIELD,
        "Where zooming costs a little and half of the questions need none, it dies out.",
        "Users of DeepEyes (issues 55, 78 and 143; in 78 no call is left after 20 steps); "
        "PyVision-RL (2602.20739) names interaction collapse. Cures: DeepEyes' bonus, "
        "Pixel-Reasoner's curiosity (2505.15966).",
        arms={
            "cost": "zoom_cost=0.1",
            "no cost": "zoom_cost=0",
            "tool bonus": "zoom_cost=0.1 tool_bonus=0.3",
            "curiosity": "zoom_cost=0.1 curiosity=0.5",
            "evidence bonus": "zoom_cost=0.1 evidence_bonus=0.3",
            "no blind prompts": "zoom_cost=0.1 blind_prompts=0",
        },
        shared=f"{ORACLE} --task search --also relation --recipe vigorl-zoom --distinct-bonus 0 "
               "--loss grpo --kl-coef 0 --blind-prompts 2 --steps 60",
        claims=(
            Claim("With the cost there is less than half a zoom per question that needs one.",
                  "cost", figure="levels.search.zooms", falls=True, handicap=0.5, least=0.0),
            Claim("With the cost there is less zooming where it is needed.",
                  "cost", "no cost", figure="levels.search.zooms", falls=True, least=0.3),
            Claim("DeepEyes' bonus makes the questions that need a zoom come out right more often.",
                  "tool bonus", "cost", figure="levels.search.accuracy_after", least=0.05),
            Claim("So does curiosity.", "curiosity", "cost",
                  figure="levels.search.accuracy_after", least=0.05),
            Claim("So does the bonus for the evidence.", "evidence bonus", "cost",
                  figure="levels.search.accuracy_after", least=0.05),
            Claim("Without blind prompts there is more zooming.", "no blind prompts", "cost",
                  figure="levels.search.zooms", least=0.3),
        ),
        show=("levels.search.zooms", "levels.relation.zooms", "levels.search.accuracy_after",
              "levels.relation.accuracy_after"),
        limits="Nothing died, so there was nothing to cure: `cost` ends so close to the top on "
               "`search` that no cure could add five points. A right answer pays 0.6 and a crop "
               "costs 0.1, so to zoom once where one must pays; had zooming died, it would have "
               "been a trap of the path, not the optimum. All arms have the questions that need "
               "no zoom; their share is not varied. The evidence of `relation` counts for the "
               "bonus, too. The traces of the warm start zoom on `search` and never on "
               "`relation`, so when to zoom is largely known before RL begins. Blind prompts are "
               "those that must be answered at once.",
        read="`appendix/mixture.py`; `rl_options.add_group_bonuses`; `rewards.vigorl_zoom`."),
    Study(
        "losses", FIELD,
        "The loss matters once a batch serves for many updates: a clip is needed.",
        "PPO (1707.06347); RGRA (2603.18756) says that no clip is needed. GSPO (2507.18071), CISPO "
        "(2506.13585) and SAPO (2511.20347) each claim to be better than GRPO's clip.",
        arms={
            "grpo, 1": "loss=grpo num_minibatches=1",
            "grpo, 4": "loss=grpo num_minibatches=4",
            "grpo, 16": "loss=grpo num_minibatches=16",
            "no clip, 16": "loss=grpo clip_low=1 clip_high=1e9 num_minibatches=16",
            "dual-clip, 4": "loss=dual-clip num_minibatches=4",
            "dual-clip, 16": "loss=dual-clip num_minibatches=16",
            "gspo, 4": f"{GSPO} num_minibatches=4",
            "gspo, 16": f"{GSPO} num_minibatches=16",
            "cispo, 4": "loss=cispo num_minibatches=4",
            "cispo, 16": "loss=cispo num_minibatches=16",
            "sapo, 4": "loss=sapo num_minibatches=4",
            "sapo, 16": "loss=sapo num_minibatches=16",
            "reinforce, 4": "loss=reinforce num_minibatches=4",
            "reinforce, 16": "loss=reinforce num_minibatches=16",
        },
        shared=f"{ORACLE} {SMALL} --steps 30",
        claims=(
            Claim("At 16 updates per batch, GRPO is better than the same loss without its clip.",
                  "grpo, 16", "no clip, 16", least=0.05),
            Claim("At 16 updates, it is better than REINFORCE, which has neither clip nor ratio.",
                  "grpo, 16", "reinforce, 16", least=0.05),
            Claim("At 16 updates, the dual clip is better than GRPO's.",
                  "dual-clip, 16", "grpo, 16"),
            Claim("At 16 updates, GSPO is better than GRPO's clip.", "gspo, 16", "grpo, 16"),
            Claim("At 16 updates, CISPO is better than GRPO's clip.", "cispo, 16", "grpo, 16"),
            Claim("At 16 updates, SAPO is better than GRPO's clip.", "sapo, 16", "grpo, 16"),
            Claim("Four updates per batch learn more in the same number of steps than one.",
                  "grpo, 4", "grpo, 1"),
        ),
        limits="With one update per batch all losses have the same gradient (tested), so one arm "
               "stands for all (not quite for `gspo`, which takes means of sequences). A run that "
               "diverges ends early: the page lists it, and its seed is missing where arms are "
               "compared, which is kind to a loss that diverges. Each of 16 updates has four "
               "episodes. The clips of GSPO are its paper's, for long answers. All learn at the "
               "same rate; a loss that takes smaller steps might like another. No run diverged in "
               "the sense of ending early: policies that fell apart count as they are. Five seeds "
               "would take longer than the half hour that a study may take.",
        read="`grpo.LOSSES`; `tests/test_grpo.py` compares each with its paper."),
    Study(
        "details", FIELD,
        "RL ends higher if advantages are not divided by the standard deviation (and five more "
        "details).",
        "Dr. GRPO (2503.20783) divides by no standard deviation; DAPO (2503.14476) takes the mean "
        "over tokens and a higher upper clip; PAPO's table (2507.06448) is better without a KL "
        "term.",
        arms={
            "base": "",
            "no division by std": "advantage_scale=none",
            "mean of sequences": "aggregate=sequence",
            "constant": "aggregate=constant",
            "equal clips": "clip_high=0.2",
            "KL 0.01": "kl_coef=0.01",
            "KL 0.04": "kl_coef=0.04",
        },
        shared=f"{ORACLE} {SMALL} --num-minibatches 4 --steps 40",
        seeds=FIVE,
        claims=(
            Claim("No division by the standard deviation is better.", "no division by std", "base"),
            Claim("The mean over tokens is better than the mean of sequences.",
                  "base", "mean of sequences"),
            Claim("The higher upper clip is better than equal ones.", "base", "equal clips"),
            Claim("No KL term is better than one of 0.01.", "base", "KL 0.01"),
            Claim("No KL term is better than one of 0.04.", "base", "KL 0.04"),
            Claim("A constant in place of the token count is better.", "constant", "base"),
        ),
        limits="All of these are small effects in long runs of large models; 40 steps of a tiny "
               "one may not reach where they differ. All six claims share the arm `base`, which "
               "ends lowest of the seven, so a part of every difference is its own. With four "
               "updates per batch it scatters: `losses` has the same arm ten steps earlier, and "
               "its seed 2 was better then.",
        read="`grpo.group_advantages`, `grpo.aggregate`, `grpo.kl_penalty`."),
    Study(
        "positives", FIELD,
        "Learning from successes alone is nearly enough.",
        "RAFT (2504.11343): training on positive samples alone is competitive with GRPO. RGRA "
        "(2603.18756) finds that negatives are needed.",
        arms={
            "all": "",
            "positives alone": "mask_negative=true",
        },
        shared=f"{ORACLE} {SMALL} --steps 60",
        seeds=FIVE,
        claims=(
            Claim("Positives alone do nearly as well: at most three points less.",
                  "positives alone", "all", handicap=0.03, least=0.0),
        ),
        limits="Positive are the episodes above the mean of their group, which is GRPO with its "
               "advantages cut at 0; RAFT takes all right ones with equal weight. Both arms end "
               "near the top.",
        read="`rl_options.mask_advantages`."),
    Study(
        "precision", FIELD,
        "A sampler in another precision than the trainer hurts (and truncated importance weights "
        "cure it).",
        "2510.26788: the mismatch of bf16 makes RL unstable; truncated importance sampling helps, "
        "fp16 nearly removes it.",
        arms={
            "fp32": "",
            "bf16, ignored": "sampler_dtype=bfloat16 mismatch=ignore",
            "bf16, truncated": "sampler_dtype=bfloat16 mismatch=truncate",
            "bf16, in the ratio": "sampler_dtype=bfloat16 mismatch=ratio",
        },
        shared=f"{ORACLE} {SMALL} --steps 40",
        seeds=FIVE,
        claims=(
            Claim("A bf16 sampler whose mismatch is ignored hurts.", "bf16, ignored", "fp32",
                  falls=True),
            Claim("Truncated importance weights are better than ignoring it.",
                  "bf16, truncated", "bf16, ignored"),
            Claim("So is the sampler's probability in the ratio, as here by default.",
                  "bf16, in the ratio", "bf16, ignored"),
        ),
        show=("logp_gap_max",),
        limits="In the paper the mismatch builds up over thousands of steps of models of 1.5B and "
               "more, and comes from other kernels, too. Forty steps of a tiny model may be too "
               "few to see harm. No gap reached the logarithm of the cap (2), so no weight was "
               "truncated: that arm is one of plain importance weights. The arm `bf16, in the "
               "ratio` divides by the sampler's probability, not the trainer's own, in GRPO's "
               "clipped ratio. bf16 is slow on CPUs without its own instructions.",
        read="`grpo.importance_weights`; `rl_options.sampler`; `logp_gap` in metrics.jsonl."),
    Study(
        "sampling-budget", FIELD,
        "At equal numbers of sampled episodes, dynamic sampling learns more.",
        "DAPO (2503.14476), section 3.2 and its figure 6, counts steps; here episodes are counted, "
        "those thrown away included.",
        arms={
            "16 x 8": "num_prompts=16 group_size=8 blind_prompts=2",
            "16 x 8, dynamic": "num_prompts=16 group_size=8 blind_prompts=2 resample=3",
            "32 x 4": "num_prompts=32 group_size=4 blind_prompts=4",
            "8 x 16": "num_prompts=8 group_size=16 blind_prompts=1",
        },
        shared=f"{ORACLE} --steps 40 --max-episodes 3840",
        seeds=FIVE,
        claims=(
            Claim("Dynamic sampling is better than none.", "16 x 8, dynamic", "16 x 8"),
            Claim("Groups of 16 are better than groups of 4.", "8 x 16", "32 x 4"),
        ),
        limits="About a quarter of the groups are without a signal, most of them late, when the "
               "task is nearly solved and there is little left to learn from others. The arm "
               "with dynamic sampling takes fewer steps, by as much as it replaces; its last step "
               "may go past the limit. The limit ends all arms before 40 steps.",
        read="`train_rl.dynamic_sampling`; `--max-episodes`."),
    Study(
        "perception", FIELD,
        "A term for perception makes answers depend on the image.",
        "PAPO (2507.06448): a KL to the policy that sees mostly black images, 47.9 to 49.9 at 3B.",
        arms={
            "grpo": "",
            "papo": "papo_coef=0.02",
        },
        shared=f"{ORACLE} {SMALL} --steps 40 --eval-wrong",
        seeds=FIVE,
        claims=(
            Claim("The accuracy falls more with black crops after training with the term.",
                  "papo", "grpo", figure="accuracy_after - accuracy_black_crop"),
            Claim("It falls more with crops of another object.",
                  "papo", "grpo", figure="accuracy_after - accuracy_wrong_crop"),
            Claim("The accuracy itself is higher.", "papo", "grpo", least=0.02),
        ),
        show=("accuracy_black_crop", "accuracy_wrong_crop"),
        limits="The drop compares two accuracies. With the term both fall by as much, so it stays "
               "what it was; to fall below chance without the crops is no better use of the "
               "image. PAPO's guard, which lowers both entropies, is left out.",
        read="`grpo.perception`; `rl_options.blindfold`."),
    Study(
        "right-reason", FIELD,
        "A reward for looking at the evidence makes right answers right for the right reason.",
        "CodeV (2511.19661) finds right answers beside wrong crops, and rewards the crops.",
        arms={
            "warm start": "steps=0",
            "outcome": "",
            "evidence bonus": "evidence_bonus=0.2",
        },
        shared=f"{ORACLE} {SMALL} --steps 40",
        seeds=FIVE,
        claims=(
            Claim("With the bonus more of the right answers come after a look at the evidence.",
                  "evidence bonus", "outcome", figure="right_and_saw / accuracy_after"),
            Claim("The reward for the outcome alone raises that share, too.",
                  "outcome", "warm start", figure="right_and_saw / accuracy_after", least=0.05),
            Claim("The bonus costs no accuracy: at most two points.",
                  "evidence bonus", "outcome", handicap=0.02, least=0.0),
        ),
        show=("saw", "right_and_saw", "right_not_saw", "wrong_though_saw"),
        limits="Four options: a quarter of blind guesses are right, so a policy that looks at "
               "nothing is right without having seen. RL on the outcome alone ends close to the "
               "top, which leaves the bonus little room. The bonus knows where the evidence is, "
               "which few training sets tell.",
        read="`evidence.saw`; `rl_options.add_group_bonuses`."),
]
