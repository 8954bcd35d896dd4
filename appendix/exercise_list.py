"""The exercises and the bugs of appendix/exercises.py, in the order of the chapters."""
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

    command: script and flags that show the symptom in under two minutes on two cores. look_at:
    keys of metrics.jsonl or summary.json that show it. tests: those that turn green when repaired.
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


EXERCISES = [
    Exercise("coordinates", "appendix.vision", "View.to_source", 5,
             "The model writes a point in the image as it was fed. Which pixel of the stored image "
             "is that?",
             "model.py, the docstring; appendix/vision.py, View.__init__",
             ("tests/test_model.py::test_coordinates",)),
    Exercise("iou", "rewards", "iou", 10,
             "How much do two boxes overlap, as a share of what they cover together?",
             "rewards.py, area",
             ("tests/test_rewards.py::test_iou_by_hand",)),
    Exercise("parser", "rewards", "answer_part", 20,
             "A policy in training writes anything. Which part of its text is the answer?",
             "rewards.py, the docstring and parse_answer",
             ("tests/test_rewards.py::test_parse_point", "tests/test_rewards.py::test_parse_box",
              "tests/test_rewards.py::test_parse_choice_and_text",
              "tests/test_rewards.py::test_time_is_linear_on_10_megabytes")),
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
             "The clip has four corners: ratio above or below, advantage above or below 0. In "
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
    Exercise("accumulation", "grpo", "aggregate", 20,
             "The sum over micro-batches must equal one large batch. By what is each divided?",
             "README, step 5",
             ("tests/test_grpo.py::test_microbatch_invariance",
              "tests/test_grpo.py::test_aggregate_weights",
              "tests/test_grpo.py::test_step_without_tokens",
              "tests/test_grpo.py::test_nan_in_a_real_token_is_loud")),
    Exercise("sampling", "zoom_rollout", "sample_tokens", 20,
             "Sample a token for every row from one uniform number each, so that a seed decides "
             "everything.",
             "zoom_rollout.py, sample_turn",
             ("tests/test_zoom_rollout.py::test_sample_tokens",
              "tests/test_zoom_rollout.py::test_greedy")),
    Exercise("crop", "zoom_rollout", "window_start", 10,
             "The window around a point near the border must stay inside the image and keep its "
             "size.",
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
              "tests/test_search.py::test_search_ends_at_a_dead_end",
              "tests/test_search.py::test_search_goes_where_it_was_right",
              "tests/test_search.py::test_search_ends_when_all_children_are_rejected")),
]

# A run that learns to look in under a minute. It begins with traces from the ground truth.
SHORT = ("train_rl.py", "--traces=oracle", "--sft-n=400", "--difficulty=easy", "--steps=25",
         "--eval-n=60")

BUGS = [
    Bug("the-reward-falls", "accuracy falls from step to step, and the loss says nothing",
        "A run that worked last week now gets worse with every step.",
        "grpo", "ppo_clip",
        "-torch.min(ratio * advantages, clipped * advantages)",
        "torch.min(ratio * advantages, clipped * advantages)",
        SHORT, ("accuracy", "reward", "format"),
        ("tests/test_grpo.py::test_clip_truth_table",),
        "The value of a policy gradient's loss means nothing: with one update per batch it is 0 "
        "either way. Look at the reward."),
    Bug("no-signal", "the reward does not move, the gradient is 0",
        "The reward is flat, frac_zero_std is near its usual value, and the gradient norm is 0.",
        "train_rl", "store_advantages",
        "e.advantage = advantage", "e.advantage = 0 * advantage",
        SHORT, ("grad_norm", "frac_zero_std", "accuracy"),
        ("tests/test_train_step.py::test_gradient_of_a_step",),
        "Follow a number from where it is made to where it is used."),
]
