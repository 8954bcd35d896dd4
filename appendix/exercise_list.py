"""The exercises and the bugs of appendix/exercises.py, in the order of the chapters.

It holds the answers of the hunt.
"""
from dataclasses import dataclass


@dataclass(frozen=True)
class Exercise:
    """A function to write. tests: those that guard it, "FILE::test_name"."""
    name: str
    module: str                         # "grpo" is grpo.py
    function: str                       # or "Class.method"
    minutes: int
    question: str
    read_first: str
    tests: tuple


@dataclass(frozen=True)
class Bug:
    """One wrong line. `old` stands exactly once in the function; `new` is what the bug makes of it.

    command: script and flags that show the symptom in under two minutes on two cores. then: the
    flags of a second start in the same folder, if there is one. look_at: keys of metrics.jsonl or
    summary.json that show it, or "steps run". tests: those that turn green when repaired.
    """
    name: str
    symptom: str
    story: str
    module: str
    function: str
    old: str
    new: str
    command: tuple
    look_at: tuple
    tests: tuple
    lesson: str
    then: tuple = ()


EXERCISES = [
    Exercise("iou", "rewards", "iou", 10,
             "How much do two boxes overlap, as a share of what they cover together?",
             "rewards.py, area",
             ("tests/test_rewards.py::test_iou_by_hand",)),
    Exercise("parser", "rewards", "answer_part", 20,
             "A policy in training writes anything. Which part of its text is the answer?",
             "rewards.py, the docstring and parse_answer",
             ("tests/test_rewards.py::test_parse_point", "tests/test_rewards.py::test_parse_box",
              "tests/test_rewards.py::test_parse_choice_and_text",
              "tests/test_rewards.py::test_time_is_linear_on_three_megabytes")),
    Exercise("group-advantages", "grpo", "group_advantages", 10,
             "Eight answers to one question, eight rewards: which answers become more likely, and "
             "by how much?",
             "README, step 4",
             ("tests/test_grpo.py::test_unbiased_std", "tests/test_grpo.py::test_group_order",
              "tests/test_grpo.py::test_zero_variance_groups",
              "tests/test_grpo.py::test_over_turn_statistics")),
    Exercise("difficulty-weight", "grpo", "difficulty_weights", 10,
             "UniVG-R1 lets hard prompts count more. How much more, and of what is `m` the mean?",
             "grpo.py, WEIGHTS",
             ("tests/test_grpo.py::test_difficulty_values",
              "tests/test_grpo.py::test_difficulty_per_group",
              "tests/test_grpo.py::test_difficulty_normalized")),
    Exercise("clip", "grpo", "ppo_clip", 15,
             "The clip has four cases: ratio above or below, advantage above or below 0. In "
             "which two is there no gradient?",
             "README, step 5; grpo.py, policy_loss",
             ("tests/test_grpo.py::test_clip_truth_table",
              "tests/test_grpo.py::test_asymmetric_clip",
              "tests/test_grpo.py::test_loss_closed_form")),
    Exercise("padding", "grpo", "policy_loss", 15,
             "Padded places may hold anything, nan included. Why must they be cleared before the "
             "ratio is taken, not after?",
             "grpo.py, ppo_clip and aggregate",
             ("tests/test_grpo.py::test_padding_does_not_leak",
              "tests/test_grpo.py::test_on_policy_gradient_equals_reinforce",
              "tests/test_grpo.py::test_loss_closed_form")),
    Exercise("kl", "grpo", "kl_penalty", 25,
             "Three estimators of the same KL have three different gradients. Write them so that "
             "small differences survive float32.",
             "grpo.py, PENALTIES and the table above kl_penalty",
             ("tests/test_grpo.py::test_kl_values", "tests/test_grpo.py::test_kl_gradient",
              "tests/test_grpo.py::test_unbiased_k3_off_policy",
              "tests/test_grpo.py::test_padding_does_not_leak")),
    Exercise("accumulation", "grpo", "aggregate", 10,
             "The sum over micro-batches must equal one large batch. By what is each divided, and "
             "what must be cleared before anything is added up?",
             "README, step 5; grpo.py, AGGREGATES and the three functions in it",
             ("tests/test_grpo.py::test_microbatch_invariance",
              "tests/test_grpo.py::test_aggregate_weights",
              "tests/test_grpo.py::test_step_without_tokens",
              "tests/test_grpo.py::test_nan_in_a_real_token_is_loud")),
    Exercise("coordinates", "appendix.vision", "View.to_source", 5,
             "The model writes a point in the image as it was fed. Which pixel of the stored image "
             "is that?",
             "model.py, the docstring; appendix/vision.py, View.__init__",
             ("tests/test_model.py::test_coordinates",)),
    Exercise("positions", "model", "mrope", 30,
             "A token of text has one position, a token of an image a row and a column. Where does "
             "the text go on after an image?",
             "model.py, the docstring of mrope: all you need stands there",
             ("tests/test_model.py::test_positions_equal_transformers",
              "tests/test_model.py::test_positions_chunk_by_chunk")),
    Exercise("cached-step", "model", "KVCache.place", 30,
             "A step with a cache must compute what a pass over the whole sequence computes. Which "
             "slots do the new tokens of each row take, and which slots may they see?",
             "model.py, KVCache: its docstring, __init__ (what `row_numbers`, `slots`, `size` and "
             "`mask` are), and `store` and `attend`, which use them",
             ("tests/test_model.py::test_cached_equals_one_shot",
              "tests/test_model.py::test_decoding_equals_prefill",
              "tests/test_model.py::test_padded_batch_equals_singletons")),
    Exercise("shared-prompt", "appendix.prefix", "SharedCache.attend_one_token", 45,
             "The rows of a group share one copy of their prompt. Write the attention of one new "
             "token per row so that it equals that of rows with a copy each, and make no copy.",
             "appendix/prefix.py: the drawing at its top, SharedCache, `place` (the mask is added "
             "to the scores), `to_prompts` and `to_rows`",
             ("tests/test_prefix.py::test_shared_prompt_equals_own",
              "tests/test_prefix.py::test_a_step_copies_no_prompt",
              "tests/test_model.py::test_decoding_equals_prefill",
              "tests/test_prefix.py::test_rollouts_are_the_same")),
    Exercise("sampling", "zoom_rollout", "sample_tokens", 20,
             "Sample a token for every row from one uniform number each, so that a seed decides "
             "everything.",
             "zoom_rollout.py, sample_turn",
             ("tests/test_zoom_rollout.py::test_sample_tokens",
              "tests/test_zoom_rollout.py::test_greedy")),
    Exercise("crop", "zoom_rollout", "window_start", 10,
             "The window around a point near the border must stay inside the image and keep its "
             "size. At which pixel does it begin?",
             "zoom_rollout.py, crop",
             ("tests/test_zoom_rollout.py::test_crop_window",)),
    Exercise("who-wrote-it", "zoom_rollout", "replay", 30,
             "A conversation has tokens of the prompt, of the policy and of the environment. Build "
             "the episode and mark those that the policy chose.",
             "zoom_rollout.py, Episode and env_step",
             ("tests/test_zoom_rollout.py::test_replay_equals_rollout",)),
    Exercise("minibatch", "train_rl", "loss_denominator", 15,
             "Groups in which all rewards are equal have no gradient. Do they count when the loss "
             "is divided?",
             "train_rl.py, train_step; grpo.py, aggregate",
             ("tests/test_train_step.py::test_gradient_of_a_step",
              "tests/test_train_step.py::test_a_penalty_of_nothing_changes_nothing")),
    Exercise("wilson", "evaluate", "wilson", 15,
             "19 of 20 right: what accuracies would be no surprise? The interval must not leave "
             "[0, 1].",
             "README, the results; Wilson 1927",
             ("tests/test_evaluate.py::test_wilson_against_published_values",
              "tests/test_evaluate.py::test_wilson_is_symmetric_inside_0_1_and_shrinks_with_n")),
    Exercise("tree-search", "appendix.tree_search", "select", 30,
             "Walk down the tree: to what was good, and to what was rarely tried. What if nothing "
             "is left below a node?",
             "appendix/tree_search.py, Node and uct",
             ("tests/test_search.py::test_uct_by_hand",
              "tests/test_search.py::test_nothing_is_left",
              "tests/test_search.py::test_search_ends_at_a_dead_end",
              "tests/test_search.py::test_search_goes_where_it_was_right",
              "tests/test_search.py::test_search_ends_when_all_children_are_rejected")),
]

# A run that learns to look in under a minute. It begins with traces from the ground truth.
SHORT = ("train_rl.py", "--traces=oracle", "--sft-n=400", "--difficulty=easy", "--steps=25",
         "--eval-n=60")

BUGS = [
    Bug("the-reward-falls", "accuracy falls from step to step",
        "A run that worked last week now gets worse with every step. No error, no warning, and the "
        "gradient is as large as ever.",
        "grpo", "ppo_clip",
        "-torch.min(ratio * advantages, clipped * advantages)",
        "torch.min(ratio * advantages, clipped * advantages)",
        SHORT, ("accuracy", "reward", "format"),
        ("tests/test_grpo.py::test_clip_truth_table",),
        "The loss would not have told you: with one update per batch its value is about 0 either "
        "way. Look at the reward."),
    Bug("no-signal", "the loss is 0, and nothing is learned",
        "You print the loss and it is 0. A colleague says that this is no bug: with one update per "
        "batch it always is, and the run learns all the same. He is right, and yet this run does "
        "not learn. Many groups have different rewards (frac_zero_std is below 1).",
        "train_rl", "store_advantages",
        "e.advantage = advantage", "e.advantage = 0 * advantage",
        SHORT, ("grad_norm", "frac_zero_std", "accuracy"),
        ("tests/test_train_step.py::test_gradient_of_a_step",),
        "A loss of 0 is fine, a gradient of 0 is not. Follow a number from where it is made to "
        "where it is used."),
    Bug("paid-for-nothing", "the reward is high and rises, accuracy does not",
        "The reward climbs to its best value, and the policy answers no better than before.",
        "rewards", "vigorl_zoom",
        '0.6 * found["accuracy"]', '0.6 * (1 - found["wrong_format"])',
        SHORT, ("reward", "accuracy", "frac_zero_std"),
        ("tests/test_rewards.py::test_right_always_beats_wrong",),
        "The policy learns what is paid, not what is meant. Read a few episodes with a high reward "
        "before you trust it."),
    Bug("zooming-dies", "zooming dies after some steps",
        "You put a price on length. It should matter only to episodes that come close to the "
        "limit, and none does. At first the policy zooms. Step by step it does so less, until it "
        "only guesses.",
        "grpo", "overlong",
        "limit - soft - lengths", "soft - lengths",
        (*SHORT, "--overlong=20"), ("zooms", "overlong", "length", "accuracy"),
        ("tests/test_grpo.py::test_overlong",),
        "When a behaviour dies, compare what an episode with it earns to what one without it "
        "earns, part by part."),
    Bug("cut-off", "every turn is cut off by the length limit",
        "No turn ends by itself: each one is as long as --max-new-tokens allows, whatever the "
        "limit is.",
        "zoom_rollout", "sample_turn",
        "live & ~ended & (written < budgets)", "live & (written < budgets)",
        SHORT, ("clipped_ratio", "length", "format", "accuracy"),
        ("tests/test_zoom_rollout.py::test_only_chosen_tokens_are_trained",),
        "Is it the policy that never ends, or the sampler that never stops? The tokens of one "
        "episode answer it."),
    Bug("the-kl-explodes", "the KL explodes",
        "The penalty should hold the policy near its reference. With it the policy runs away, "
        "faster from step to step, and loses what it had learned.",
        "train_rl", "grpo_loss",
        "per_token + cfg.kl_coef * penalty", "per_token - cfg.kl_coef * penalty",
        (*SHORT, "--kl-coef=0.3"), ("kl", "entropy", "format", "accuracy"),
        ("tests/test_train_step.py::test_kl_pulls_towards_the_reference",),
        "A loss is minimised: what is to become small is added to it, what is to become large is "
        "subtracted."),
    Bug("crops-off", "the points are right, the crops are not",
        "The policy names the right point, the crop shows another place. Look at an episode in the "
        "report, below \"before RL\": where is the window, where is the point?",
        "zoom_rollout", "crop",
        "window_start(y, height, source.height)", "window_start(x, height, source.height)",
        SHORT, ("saw", "accuracy", "accuracy_after"),
        ("tests/test_zoom_rollout.py::test_crop_window",),
        "No error, no warning, and where x and y are alike the crop is right. Only a picture, or a "
        "metric that knows where the evidence is, shows such a bug."),
    Bug("resume-repeats", "a resumed run is not the run that was stopped",
        "Four steps, a stop, four more: the result is not that of eight steps in one go.",
        "appendix.rl_run", "RunLog.stops_after",
        "self.save(done)", 'self.save(row["step"])',
        ("train_rl.py", "--traces=oracle", "--sft-n=100", "--difficulty=easy", "--steps=4",
         "--eval-n=8"), ("steps run", "accuracy", "reward"),
        ("tests/test_train_step.py::test_resume_equals_unbroken",),
        "A checkpoint holds weights and the number of steps that made them. If the two disagree by "
        "one, a step is done twice or never.",
        then=("--resume", "--steps=8")),
    Bug("two-temperatures", "sampler and trainer disagree",
        "At temperature 1 all is well. At any other, the clip stops tokens although there is one "
        "update per batch, in which every ratio should be 1.",
        "train_rl", "grpo_loss",
        "vlm.logprobs(micro_batch, cfg.temperature)", "vlm.logprobs(micro_batch)",
        (*SHORT, "--temperature=0.6"), ("logp_gap", "clipfrac", "accuracy"),
        ("tests/test_train_step.py::test_sampler_and_trainer_agree_and_it_would_show",),
        "The ratio compares two policies. Whatever shapes the distribution of one (temperature, "
        "forbidden tokens, precision) must shape that of the other."),
    Bug("the-control-zooms", "without zooms it is as good as with them",
        "The paper is nearly written when someone looks at the control: the policy answers as well "
        "when it may not zoom. So are the zooms useless?",
        "zoom_rollout", "RolloutConfig.zoom_limit",
        'self.style == "zoom" and self.zoom != "off"', 'self.style == "zoom"',
        SHORT, ("accuracy_after", "accuracy_no_zoom", "accuracy_blind"),
        ("tests/test_zoom_rollout.py::test_zoom_forbidden",),
        "A control must be checked like any other result: does it do what its name says? The blind "
        "prompts of every step were the first sign."),
]
