"""TRL's GRPOTrainer as a peer, on a copy of our weights and on the same prompts and images.

TRL is no dependency: `pip install trl==1.16.0` into an environment of its own. speed.py imports
this file only if TRL is there.
"""
import copy
import os
import random
import tempfile
from dataclasses import dataclass, field
from unittest import mock

import datasets
import torch
import transformers
import trl
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor

import data


@dataclass
class TrlTimes:
    """What TRL's steps took."""
    steps: list = field(default_factory=list)           # seconds of each step
    generation: list = field(default_factory=list)      # seconds of its generation alone
    prompt_lengths: list = field(default_factory=list)  # tokens of each prompt, as TRL feeds it


class StepTimer(transformers.TrainerCallback):
    """Measures TRL's steps and calls `between()` after each, which is not measured."""

    def __init__(self, times, clock, between):
        self.times = times
        self.clock = clock
        self.between = between
        self.began = 0.0

    def on_train_begin(self, *args, **kwargs):
        self.began = self.clock()

    def on_step_end(self, *args, **kwargs):
        self.times.steps.append(self.clock() - self.began)
        self.between()
        self.began = self.clock()


class TimedTrainer(trl.GRPOTrainer):
    """GRPOTrainer that also measures its generation and keeps the lengths of its prompts."""

    def __init__(self, times, clock, **options):
        self.times = times
        self.clock = clock
        super().__init__(**options)

    def _generate(self, prompts):
        began = self.clock()
        out = super()._generate(prompts)
        self.times.generation.append(self.clock() - began)
        return out

    def _generate_and_score_completions(self, inputs):
        out = super()._generate_and_score_completions(inputs)
        if not self.times.prompt_lengths:
            lengths = out["prompt_mask"].sum(1).tolist()
            self.times.prompt_lengths += lengths[::self.num_generations]
        return out


class DrawnRewards:
    """A reward function that draws rewards, and checks that all answers have the same length."""
    __name__ = "drawn"                                  # TRL logs it under this name

    def __init__(self, new_tokens):
        self.new_tokens = new_tokens
        self.rng = random.Random(0)

    def __call__(self, completion_ids, **kwargs):
        assert all(len(ids) == self.new_tokens for ids in completion_ids)
        return [self.rng.random() for _ in completion_ids]


def trl_steps(vlm, load, rounds, clock, between):
    """`rounds` GRPO steps of TRL with the one turn of `load`, between() after each.

    clock() gives seconds.
    """
    times = TrlTimes()
    with tempfile.TemporaryDirectory() as folder:
        config = trl.GRPOConfig(
            output_dir=folder, use_cpu=vlm.device.type == "cpu", bf16=vlm.dtype == torch.bfloat16,
            per_device_train_batch_size=len(load.samples) * load.group, num_generations=load.group,
            max_completion_length=load.turn_tokens, max_steps=rounds, learning_rate=1e-6, beta=0.0,
            temperature=1.0, gradient_checkpointing=False, report_to="none", save_strategy="no",
            logging_strategy="no", disable_tqdm=True, shuffle_dataset=False,
            generation_kwargs={"min_new_tokens": load.turn_tokens})
        trainer = TimedTrainer(
            times, clock, model=copy.deepcopy(vlm.model), processing_class=processor_of(vlm),
            reward_funcs=DrawnRewards(load.turn_tokens), args=config,
            callbacks=[StepTimer(times, clock, between)],
            train_dataset=datasets.Dataset.from_list(prompt_rows(load.samples) * rounds))
        trainer.train()
    return times


def processor_of(vlm):
    """Our tokenizer and image processor as transformers' processor, which feeds images as we do."""
    settings = vlm.processor.to_dict()
    settings["size"] = {"shortest_edge": vlm.spec.min_pixels, "longest_edge": vlm.spec.max_pixels}
    images = type(vlm.processor).from_dict(settings)
    path = os.path.join(trl.__path__[0], "chat_templates", "qwen2_5_vl.jinja")
    with open(path, encoding="utf-8") as f:
        template = f.read()
    # transformers insists on its own tokenizer class; ours has the same interface.
    with mock.patch.object(transformers.processing_utils.ProcessorMixin,
                           "check_argument_for_proper_class", return_value=None):
        return Qwen2_5_VLProcessor(
            images, copy.deepcopy(vlm.tokenizer), None, chat_template=template)


def prompt_rows(samples):
    """The prompts as rows of TRL's dataset."""
    rows = []
    for sample in samples:
        system, text = data.prompt(sample, "think")
        messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
        rows.append({"prompt": messages, "image": sample.images[0]})
    return rows
