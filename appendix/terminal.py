"""What a run says besides its lines per step: the plan, one question twice, what to try next."""
import shlex
import textwrap

import evaluate
from appendix import ranks
from model import is_tiny

LONGEST = 600                   # characters of a turn that are shown


def print_plan(cfg):
    """What a run of train_rl.py will do, in one paragraph."""
    parts = []
    if cfg.traces == "mcts":
        parts.append(f"find {cfg.sft_n} traces by tree search and fine-tune on them")
    elif cfg.traces:
        parts.append(f"fine-tune on traces ({cfg.traces})")
    parts.append(f"ask {cfg.eval_n} held-out questions")
    parts.append(f"{cfg.steps} steps of GRPO with {cfg.num_prompts} prompts x {cfg.group_size} "
                 "episodes")
    parts.append("ask the held-out questions again")
    print(wrapped("plan: " + "; ".join(parts) + "."), flush=True)


def wrong_one(episodes):
    """The id of the first question that was answered wrong; if there is none, of the first one.

    None without episodes: with more ranks than questions a rank has none.
    """
    for e in episodes:
        if not evaluate.is_right(e.reward_components):
            return e.sample.id
    return episodes[0].sample.id if episodes else None


def print_example(episodes, label, sample_id):
    """What the policy thought, did and was shown, for the question with this id, if it is here."""
    if ranks.rank() > 0:
        return
    for e in episodes:
        if e.sample.id == sample_id:
            print_episode(e, label)
            return


def print_episode(e, label):
    print(f"\none held-out question, {label}: {e.sample.question}{right_answer(e.sample)}")
    for turn in e.turns:
        thought = " ".join(thought_of(turn).split())
        print(wrapped(thought[:LONGEST] or "(no thought)", indent="  | "))
        print(wrapped(action_text(turn)[:LONGEST], indent="    "))
    verdict = "right" if evaluate.is_right(e.reward_components) else "wrong"
    print(f"  {verdict}\n", flush=True)


def thought_of(turn):
    """What stands inside the first <think> tags; empty if there are none, or no turn."""
    if turn is None:
        return ""
    return turn.text.partition("<think>")[2].partition("</think>")[0].strip()


def action_text(turn):
    """What a turn did: zoom, or answer, or neither in a form that can be read."""
    if turn is None:
        return ""
    if turn.error:
        return f"a call that was refused: {turn.error}"
    if turn.point:
        return f"zoom into {turn.point}"
    answer = turn.text.partition("<answer>")[2].partition("</answer>")[0].strip()
    return f"answer: {answer}" if answer else "no answer"


def right_answer(sample):
    if sample.answer_type == "choice" and sample.answer is not None:
        return f" (right: {sample.options[sample.answer]})"
    return ""


def wrapped(text, indent=""):
    return textwrap.fill(text, 98, initial_indent=indent, subsequent_indent=indent or "      ")


def print_next(cfg):
    """What to try after a run of the tiny model."""
    if ranks.rank() > 0 or not is_tiny(cfg.model):
        return
    name = shlex.quote(cfg.name)
    print("next:")
    if not cfg.plain:
        print(f"  open runs/{name}/report.html                          the episodes, drawn")
    policy = f"runs/{name}/checkpoint"
    print(f"  python evaluate.py --model {policy} --task {cfg.task} --difficulty hard")
    task = "relation" if cfg.task == "search" else "search"
    print(f"  python train_rl.py --task {task} --name {task}")
    print("  python -m appendix.exercises list                        write a part of it yourself")
