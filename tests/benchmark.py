"""Speed against a peer, in the same run, on the same weights and prompts.

    python tests/benchmark.py rollout                                  # the tiny model in the default world
    python tests/benchmark.py search                                   # tree search against single sampling, from the shipped base
    python tests/benchmark.py rollout --prompts 2 --image-tokens 1024 --new-tokens 64
    python tests/benchmark.py rollout --model qwen2.5-vl-3b --random --prompts 8 --image-tokens 1024 --new-tokens 512 --device cuda

    python tests/benchmark.py train                                    # the same for training; --model mid: width 512, 8 layers,
    python tests/benchmark.py train --model mid --prompts 2 --image-tokens 1024         # 1,024 image tokens; a 3B on one GPU:
    python tests/benchmark.py train --model qwen2.5-vl-3b --random --prompts 16 --image-tokens 1024 --new-tokens 600 --turns 5 --recompute --micro-tokens 16384

    python tests/benchmark.py plan --model qwen2.5-vl-3b               # what a 3B needs, without having it

rollout: sampled tokens per second of our sampler and of transformers' `generate`, end of turn disabled so that both do equal
work; then two zoom turns, against a loop around `generate` that sends the whole conversation again each turn, as the papers'
code and TRL do; then, where TRL is installed, the generation of its GRPO steps (one turn). Rounds alternate; a ratio is the median
over rounds. With it what was computed and what the other computes, and the largest gap between the sampler's log-probabilities
and the trainer's. The last line is one JSON object. --random: the model's shape with random weights, which speed does not look at
(its tokenizer is the tiny model's). On CUDA also with graphs, and the share of the measured copy bandwidth, if each decode step
reads the text model's weights and all of the cache once.

search: for how many questions does tree search find a trace that is whole and ends right, and for how many do as many single
paths do, as fit into the tokens that it computed (pass@k)? The paths are sampled step by step like those of the tree, so both need
the same form; as_policy is one plain rollout in the policy's own prompt and form. In brackets: for how many a right trace also
looked at the place that the answer depends on, the rest is luck. tokens_naive: had every step sent its whole conversation. Right ends:
the share of the single paths, and of the tree's rollouts, that end right.

train: the update (log-probabilities and gradient) of episodes with zooms, a group's prompt computed once (packed) or every episode
by itself (plain): time, peak memory, largest gap between the gradients relative to the largest gradient; and what a step of 128
prompts, as ViGoRL's, would take: rollout and update of these, times 128 / --prompts. Then a whole GRPO step (single turn, all answers
of the same length, rewards drawn) and, where it is installed, TRL's on the same weights, prompts, images and number of tokens (`pip
install trl==1.16.0` into an environment of its own; without it its fields are null). --micro-tokens: unless given, the update is one
pass, so that peaks can be compared, and the step has those of train_rl.py. On a CPU the seconds are those of the processor, summed
over threads (OMP_NUM_THREADS=1 for a clean figure).
"""
import argparse, copy, ctypes, gc, importlib.util, itertools, json, os, random, statistics, sys, tempfile, time
from unittest import mock

import torch
from PIL import Image

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data, model, rewards, train_rl, train_sft, zoom_rollout


def questions(vlm, n, image_tokens):
    """Toy questions; with image_tokens, their scenes enlarged to be fed as so many (speed does not look at the picture)."""
    samples = data.toy("search", "test", n, 0, side=vlm.toy_side)
    if image_tokens:
        side = round(image_tokens ** 0.5) * vlm.factor
        vlm.max_pixels = side * side
        for s in samples:
            s.images = [s.images[0].resize((side, side), Image.BICUBIC)]
    return samples


def observation(vlm, view, rng):
    crop = zoom_rollout.crop(vlm, view, rng.randrange(view.source.width), rng.randrange(view.source.height))
    return [vlm.im_end] + vlm.ids("\n") + vlm.chat("user", data.OBSERVE[0], crop, data.OBSERVE[1]) + vlm.chat("assistant", open=True), crop


def ours(vlm, samples, group, new_tokens, turns, seed, graphs=False):
    """zoom_rollout's parts with turns of a fixed length. -> the conversations as episodes."""
    rng, u = random.Random(seed), torch.rand(len(samples) * group, turns, new_tokens, dtype=torch.double).to(vlm.device)
    prompts = [zoom_rollout.begin(vlm, s) for s in samples]
    talks = [zoom_rollout.Episode(e.sample, list(e.ids), list(e.sampled), list(e.logprobs), list(e.views)) for e in prompts for _ in range(group)]
    cache = vlm.new_cache(len(prompts))
    logits, starts = vlm.extend(cache, [e.ids for e in prompts], [0] * len(prompts), [v for e in prompts for v in e.views])
    share = [p for p in range(len(prompts)) for _ in range(group)]
    cache, logits, starts = cache.share(torch.tensor(share, device=vlm.device)), logits[share], [starts[p] for p in share]
    for t in range(turns):
        said, logps, starts = zoom_rollout.sample_turn(vlm, cache, logits, starts, u[:, t], 1.0, new_tokens, graphs)
        for e, ids, lps in zip(talks, said, logps):
            e.say(vlm, ids, lps)
        if t + 1 < turns:
            seen = [observation(vlm, e.views[0], rng) for e in talks]
            logits, starts = vlm.extend(cache, [s[-1:] + ids for s, (ids, _) in zip(said, seen)], starts, [crop for _, crop in seen])
            for e, (ids, crop) in zip(talks, seen):
                e.say(vlm, ids, views=[crop], sampled=False)
    return talks


def theirs(vlm, samples, group, new_tokens, turns, seed):
    """The same with `generate`: every member of the group brings its own image, every turn sends everything again."""
    rng, pad = random.Random(seed), vlm.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    talks = [(list(e.ids), list(e.views)) for e in (zoom_rollout.begin(vlm, s) for s in samples for _ in range(group))]
    for t in range(turns):
        width = max(len(ids) for ids, _ in talks)
        ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids, _ in talks], device=vlm.device)               # left padding
        views = [v for _, views in talks for v in views]
        out = vlm.model.generate(
            input_ids=ids, attention_mask=(ids != pad).long(), mm_token_type_ids=(ids == vlm.image_token).long(),
            pixel_values=vlm.processor([v.pixels() for v in views], do_resize=False, return_tensors="pt")["pixel_values"].to(vlm.device, vlm.dtype),
            image_grid_thw=torch.tensor([v.grid for v in views], device=vlm.device),
            do_sample=True, top_k=0, top_p=1.0, temperature=1.0, min_new_tokens=new_tokens, max_new_tokens=new_tokens,
            suppress_tokens=vlm.unsayable.tolist(), pad_token_id=pad)
        if t + 1 < turns:
            seen = [observation(vlm, views[0], rng) for _, views in talks]
            talks = [(ids + s + more, views + [crop]) for (ids, views), s, (more, crop) in zip(talks, out[:, width:].tolist(), seen)]
    return talks


def seconds(vlm, f, *args):
    if vlm.device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    talks = f(vlm, *args)
    if vlm.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, talks


def random_weights(name, device):
    """A model of MODELS in its full shape with random weights, as far as a network is not needed: sizes as published."""
    tiny = model.load("tiny", "cpu", quiet=True)
    spec = model.MODELS.get(name, tiny.spec)
    sizes = {"qwen2.5-vl-3b": dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2,
                                   vocab_size=151936, tie_word_embeddings=True),
             "qwen2.5-vl-7b": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
                                   vocab_size=152064, tie_word_embeddings=False),
             "mid": dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2,
                         vocab_size=len(tiny.tokenizer), tie_word_embeddings=True)}
    if name not in sizes:
        model.fail(f"random weights and memory plans are for {', '.join(sizes)}, not for {name!r}: choose one with --model")
    sizes = sizes[name]
    section = [8, 12, 12] if name == "mid" else [16, 24, 24]
    t, text = tiny.model.config, dict(sizes, rope_parameters={"rope_type": "default", "mrope_section": section, "rope_theta": 1e6},
                                      max_position_embeddings=128_000, bos_token_id=None, eos_token_id=tiny.im_end)
    vision = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=sizes["hidden_size"], patch_size=14,
                  window_size=112, fullatt_block_indexes=[7, 15, 23, 31])
    if name == "mid":                                                          # the tiny model's tower
        vision = dict(t.vision_config.to_dict(), out_hidden_size=512)
    config = model.transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=sizes["tie_word_embeddings"],
        **{k: getattr(t, k) for k in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")})
    dtype = torch.bfloat16 if device != "cpu" else torch.float32
    with torch.device(device):
        torch.set_default_dtype(dtype)
        net = model.transformers.Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa")
        torch.set_default_dtype(torch.float32)
    return model.VLM(net, tiny.tokenizer, tiny.processor, name, spec)


def copy_bandwidth(device):
    """Bytes per second of a large copy, counted once for the read and once for the write."""
    a = torch.empty(2 ** 30, dtype=torch.uint8, device=device)
    b, best = torch.empty_like(a), 0.0
    for _ in range(10):
        torch.cuda.synchronize()
        began = time.perf_counter()
        b.copy_(a)
        torch.cuda.synchronize()
        best = max(best, 2 * a.numel() / (time.perf_counter() - began))
    return best


def rollout(args):
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    vlm = random_weights(args.model, device) if args.random else model.load(args.model, device)
    samples, cuda = questions(vlm, args.prompts, args.image_tokens), device != "cpu"
    vlm.unsayable = torch.cat([vlm.unsayable, torch.tensor([vlm.im_end], device=vlm.device)])
    result, gap = {}, 0.0
    for turns in (1, 3):
        rivals = {"ours": ours, "generate": theirs}
        if cuda:
            rivals["with graphs"] = lambda *a: ours(*a, graphs=True)
        took, count = {name: [] for name in rivals}, args.prompts * args.group * turns * (args.new_tokens // turns)
        for r in range(args.rounds + 1):                                       # the first round warms up
            for name, f in rivals.items():
                before = dict(vlm.work)
                s, talks = seconds(vlm, f, samples, args.group, args.new_tokens // turns, turns, r)
                took[name].append(s)
                if name == "ours":
                    run, naive = {k: v - before[k] for k, v in vlm.work.items()}, zoom_rollout.naive_work(vlm, talks)
        per_second = {name: count / statistics.median(v[1:]) for name, v in took.items()}
        ratio = statistics.median(y / x for x, y in zip(took["ours"][1:], took["generate"][1:]))
        print(f"{'one turn' if turns == 1 else 'two zooms':10s}" + "   ".join(f"{name} {v:,.0f} tokens/s" for name, v in per_second.items()) + f"   ratio {ratio:.1f}\n"
              f"{'':10s}prefilled {run['tokens']:,} tokens instead of {naive['tokens']:,}, encoded {run['patches']:,} patches instead of {naive['patches']:,}")
        mine = ours(vlm, samples, args.group, args.new_tokens // turns, turns, 0)[::args.group]
        with torch.no_grad():
            logprobs, _, mask = vlm.logprobs(mine)
        old = torch.zeros_like(logprobs)
        for b, e in enumerate(mine):
            old[b, :len(e.ids)] = torch.tensor(e.logprobs)
        gap = max(gap, (logprobs - old).abs()[mask].max().item())
        result |= ({"ours_tokens_per_second": per_second["ours"], "hf_tokens_per_second": per_second["generate"], "ratio_hf": ratio} if turns == 1 else
                   {"ratio_hf_zoom": ratio, "vision_patches_saved": 1 - run["patches"] / naive["patches"], "prefill_tokens_saved": 1 - run["tokens"] / naive["tokens"]})
        if cuda and turns == 1:
            text, lm = vlm.model.config.text_config, vlm.model.model.language_model
            weights = sum(p.numel() for p in lm.layers.parameters()) + vlm.model.lm_head.weight.numel()
            slot = 2 * text.num_hidden_layers * text.num_key_value_heads * lm.layers[0].self_attn.head_dim
            held = sum(len(e.ids) for e in mine) + len(talks) * args.new_tokens / 2          # a prompt once per group; half the turn on average
            read = (weights + slot * held) * vlm.model.dtype.itemsize * args.new_tokens
            best = max(per_second["ours"], per_second["with graphs"])
            result |= {"graphs_tokens_per_second": per_second["with graphs"], "bandwidth_fraction": read * best / count / copy_bandwidth(device)}
    if importlib.util.find_spec("trl"):
        took, count = [], args.prompts * args.group * args.new_tokens
        _, generating, _ = trl_steps(vlm, samples, args.group, args.new_tokens, args.rounds + 1,
                                     lambda: took.append(seconds(vlm, ours, samples, args.group, args.new_tokens, 1, len(took))[0]))
        result |= {"trl_tokens_per_second": count / statistics.median(generating[1:]), "ratio_trl": statistics.median(y / x for x, y in zip(took[1:], generating[1:]))}
        print(f"TRL       one turn: ours {count / statistics.median(took[1:]):,.0f} tokens/s   its generation {result['trl_tokens_per_second']:,.0f} tokens/s   "
              f"ratio {result['ratio_trl']:.1f}")
    result["max_logprob_gap"] = gap
    print(json.dumps({k: float(f"{v:.3g}") for k, v in result.items()}))


def paths_of(vlm, samples, style, cfg, k, seed):
    """k single paths for each sample, steps as in the search but no tree -> [k paths] per sample, tokens computed"""
    sampler = train_sft.Sampler(vlm, samples, style, cfg, seed)
    paths = [p for p in sampler.prompt_paths for _ in range(k)]
    while not all(p.over for p in paths):
        going = [i for i, p in enumerate(paths) if not p.over]
        for i, p in zip(going, sampler.step([paths[i] for i in going], [cfg.depth] * len(going))):
            paths[i] = p
    return [paths[i:i + k] for i in range(0, len(paths), k)], sampler.computed


def search(args):
    vlm, rows, total = model.load(args.model, args.device), [], {"tokens_computed": 0, "tokens_naive": 0}
    traces, seconds, cfg = 0, 0.0, train_sft.Config()
    print(f"{'':18s}{'as policy':>10s}{'top-1':>11s}{'pass@k':>11s}{'  k':5s}{'tree search':>12s}{'tokens':>9s}{'naive':>9s}  right ends: paths, rollouts")
    for task in ("search", "relation"):
        for difficulty in ("medium", "hard"):
            samples, style = data.toy(task, "train", args.prompts, f"benchmark{args.seed}", difficulty, vlm.toy_side), data.STYLES[data.RECIPES[task]]
            began = time.perf_counter()
            roots, sampler = train_sft.tree_search(vlm, samples, style, cfg, args.seed)
            seconds += time.perf_counter() - began
            traces += sum(len(train_sft.linearise(train_sft.outline(root), cfg)) for root in roots)
            played = lambda node: node.rollouts + [path for child in node.children for path in played(child)]
            found = [played(root) for root in roots]

            once, tokens = paths_of(vlm, samples, style, cfg, 1, args.seed + 1)
            prompts = sum(len(zoom_rollout.begin(vlm, s, style).ids) for s in samples)
            k = max(1, round((sampler.computed - prompts) / (tokens - prompts)))
            several, _ = paths_of(vlm, samples, style, cfg, k, args.seed + 2)
            saw = lambda p: task != "search" or train_sft.saw_it([p.episode])
            right = lambda paths, also=lambda p: True: sum(any(train_sft.outcome(p) and also(p) for p in of) for of in paths) / len(paths)
            ends = lambda paths: sum(train_sft.outcome(p) for of in paths for p in of) / sum(map(len, paths))        # the share that ends right
            plain = [rewards.score(e.sample, e.text, e.turns, data.RECIPES[task], e.frames, 3)
                     for e in zoom_rollout.rollout(vlm, samples, max_new_tokens=cfg.max_new_tokens, seed=args.seed, style=style)]
            row = {"task": task, "difficulty": difficulty, "as_policy": sum(parts["accuracy"] * parts["format"] for parts in plain) / len(plain), "k": k,
                   "top1": right(once), "pass_k": right(several), "mcts": right(found), "top1_saw": right(once, saw), "pass_k_saw": right(several, saw),
                   "mcts_saw": right(found, saw), "right_paths": ends(several), "right_rollouts": ends(found)}
            rows.append(row)
            total = {"tokens_computed": total["tokens_computed"] + sampler.computed, "tokens_naive": total["tokens_naive"] + sampler.naive}
            cell = lambda key: f"{row[key]:.0%}" + (f" ({row[key + '_saw']:.0%})" if task == "search" else "")
            print(f"{task + ', ' + difficulty:18s}{row['as_policy']:10.0%}{cell('top1'):>11s}{cell('pass_k'):>11s}{f'  {k}':5s}{cell('mcts'):>12s}"
                  f"{sampler.computed:9,}{sampler.naive:9,}{ends(several):8.0%}{ends(found):8.0%}", flush=True)
    mean = lambda key: round(sum(row[key] for row in rows) / len(rows), 3)
    print(json.dumps({"traces_per_second": round(traces / seconds, 2), **total, "correct_share_mcts": mean("mcts"), "correct_share_sampling": mean("pass_k"),
                      "correct_share_top1": mean("top1"), "rows": rows}))


def held(device):
    """Bytes in use now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated()
    gc.collect(), ctypes.CDLL(None).malloc_trim(0)
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")


def measured(device, f):
    """-> seconds, the bytes at most in use while f ran beyond those before, its result. (Linux can forget a process's peak.)"""
    before = held(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        open("/proc/self/clear_refs", "w").write("5")
    began = model.clock()
    result = f()
    took = model.clock() - began
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else next(
        int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return took, peak - before, result


def update(vlm, episodes, advantages, share, micro_tokens):
    """The gradient of a step, in place."""
    tokens = sum(sum(e.sampled) for e in episodes)
    of = dict(zip(map(id, episodes), advantages))
    for part in vlm.micro_batches(episodes, micro_tokens):
        logprobs, _, _ = vlm.logprobs(part, share=share)
        (-(torch.tensor([of[id(e)] for e in part], device=vlm.device)[:, None] * logprobs).sum() / tokens).backward()


def our_steps(vlm, samples, group, new_tokens, micro_tokens, offload):
    """Whole steps, one whenever the next is asked for: roll out, reward, advantages, loss, update -> metrics, the lengths of the prompts."""
    vlm.unsayable = torch.cat([vlm.unsayable, torch.tensor([vlm.im_end], device=vlm.device)])
    cfg = train_rl.Config(recipe="vigorl", num_prompts=len(samples), group_size=group, max_new_tokens=new_tokens, micro_tokens=micro_tokens)
    optimizer, rng = model.AdamW(vlm.parameters(), 1e-6, offload=offload), random.Random(0)
    drawn = lambda *_, **__: {"reward": rng.random(), "accuracy": 1.0, "format": 1.0}
    for step in itertools.count():
        with mock.patch.object(rewards, "score", drawn):
            metrics, episodes = train_rl.train_step(vlm, None, optimizer, samples, cfg, step)
        assert all(sum(e.sampled) == new_tokens for e in episodes)
        yield metrics, [e.sampled.index(True) for e in episodes[::group]]


def trl_steps(vlm, samples, group, new_tokens, rounds, between):
    """The same with TRL's GRPOTrainer, on a copy of the model, and `between()` after each step -> seconds of each step, of its generation
    alone; the lengths of the prompts."""
    import datasets, trl
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
    from transformers import TrainerCallback
    with mock.patch.object(model.transformers.processing_utils.ProcessorMixin, "check_argument_for_proper_class", lambda *_: None):
        template = open(os.path.join(trl.__path__[0], "chat_templates", "qwen2_5_vl.jinja")).read()
        processor = Qwen2_5_VLProcessor(copy.deepcopy(vlm.processor), copy.deepcopy(vlm.tokenizer), None, chat_template=template)
    processor.image_processor.size = {"shortest_edge": 4 * vlm.factor ** 2, "longest_edge": vlm.max_pixels}          # fed as ours are
    rng, took, generating, lengths = random.Random(0), [], [], []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.began = model.clock()

        def on_step_end(self, *_, **__):
            took.append(model.clock() - self.began)
            between()
            self.began = model.clock()

    def reward(completion_ids, **_):
        assert all(len(ids) == new_tokens for ids in completion_ids)
        return [rng.random() for _ in completion_ids]

    rows = []
    for s in samples:
        system, text = data.prompt(s, "think")
        rows.append({"prompt": [{"role": "system", "content": system}, {"role": "user", "content": text}], "image": s.images[0]})
        lengths.append(len(zoom_rollout.begin(vlm, s, "think").ids))
    net = copy.deepcopy(vlm.model)
    with tempfile.TemporaryDirectory() as folder:
        config = trl.GRPOConfig(
            output_dir=folder, use_cpu=vlm.device.type == "cpu", bf16=vlm.dtype == torch.bfloat16, per_device_train_batch_size=len(samples) * group,
            num_generations=group, max_completion_length=new_tokens, max_steps=rounds, learning_rate=1e-6, beta=0.0, temperature=1.0,
            gradient_checkpointing=False, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, shuffle_dataset=False,
            generation_kwargs={"min_new_tokens": new_tokens})
        trainer = trl.GRPOTrainer(model=net, processing_class=processor, reward_funcs=reward, args=config, callbacks=[Clock()],
                                  train_dataset=datasets.Dataset.from_list(rows * rounds))
        seen, generate, score = [], trainer._generate, trainer._generate_and_score_completions

        def timed(prompts):
            began = model.clock()
            out = generate(prompts)
            generating.append(model.clock() - began)
            return out

        trainer._generate = timed
        trainer._generate_and_score_completions = lambda inputs: (out := score(inputs), seen.extend(out["prompt_mask"].sum(1).tolist()[::group]))[0]
        trainer.train()
    return took, generating, seen[:len(samples)]


def train(args):
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    if device == "cpu":
        model.clock = time.process_time                                        # seconds of the processor: a busy machine changes them little
    vlm = random_weights(args.model, device) if args.random or args.model == "mid" else model.load(args.model, device)
    samples, rng = questions(vlm, args.prompts, args.image_tokens), random.Random(0)
    vlm.unsayable = torch.cat([vlm.unsayable, torch.tensor([vlm.im_end], device=vlm.device)])
    for r in range(2):                                                         # the first one warms up
        began = model.clock()
        episodes = ours(vlm, samples, args.group, args.new_tokens // args.turns, args.turns, r)
        rolling = model.clock() - began
    vlm.unsayable, vlm.recompute = vlm.unsayable[:-1], args.recompute
    advantages, ways = [rng.uniform(-1, 1) for _ in episodes], {"packed": True, "plain": False}
    runs, gradients = {name: [] for name in ways}, {}
    for r in range(args.rounds + 1):
        for name, share in ways.items():
            runs[name].append(measured(vlm.device, lambda: update(vlm, episodes, advantages, share, args.micro_tokens or 10 ** 9))[:2])
            gradients[name] = [p.grad.float().cpu() for p in vlm.parameters()] if r == 0 else None
            for p in vlm.parameters():
                p.grad = None
        if r == 0:
            gap = max((a - b).abs().max().item() for a, b in zip(*gradients.values())) / max(b.abs().max().item() for b in gradients["plain"])
            gradients.clear()
    second = {name: statistics.median(s for s, _ in v[1:]) for name, v in runs.items()}
    peak = {name: statistics.median(m for _, m in v[1:]) for name, v in runs.items()}
    speedup = statistics.median(b / a for (a, _), (b, _) in zip(runs["packed"][1:], runs["plain"][1:]))
    prompt, whole = len(zoom_rollout.begin(vlm, samples[0]).ids), len(episodes[0].ids)
    print(f"update    {len(samples)} prompts x {args.group} episodes of {whole:,} tokens, {prompt:,} of them the prompt: packed {second['packed']:.2f} s, "
          f"{peak['packed'] / 1e9:.2f} GB   plain {second['plain']:.2f} s, {peak['plain'] / 1e9:.2f} GB   {speedup:.1f} times faster; gradients differ by {gap:.0e}\n"
          f"          their rollout {rolling:.2f} s; a step of 128 prompts would take ({rolling:.2f} + {second['packed']:.2f}) x 128 / {len(samples)} = "
          f"{(rolling + second['packed']) * 128 / len(samples):,.0f} s")
    result = {"packed_speedup": speedup, "packed_memory_ratio": peak["plain"] / peak["packed"], "max_grad_gap": gap,
              "step_seconds": None, "trl_step_seconds": None, "ratio_trl": None}
    if args.step:
        peer = importlib.util.find_spec("trl")
        steps, done = our_steps(vlm, samples, args.group, args.new_tokens, args.micro_tokens or train_rl.Config.micro_tokens, args.offload), []
        turn = lambda: done.append(next(steps))
        if vlm.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if peer:                                                               # steps alternate
            theirs, _, their_lengths = trl_steps(vlm, samples, args.group, args.new_tokens, args.rounds + 1, turn)
        else:
            for _ in range(args.rounds + 1):
                turn()
        seconds, (metrics, lengths) = [m["seconds"] for m, _ in done[1:]], done[-1]                # the first one warms up
        result["step_seconds"] = statistics.median(seconds)
        print("share of the step: " + ", ".join(f"{k[6:]} {v:.0%}" for k, v in metrics.items() if k.startswith("share_"))
              + (f"; peak memory {model.peak_memory() / 1e9:.1f} GB" if vlm.device.type == "cuda" else "")
              + f"\nstep      {len(samples)} prompts x {args.group} answers of {args.new_tokens} tokens, prompts of {lengths[0]:,}: {result['step_seconds']:.2f} s")
        if peer:
            result |= {"trl_step_seconds": statistics.median(theirs[1:]), "ratio_trl": statistics.median(t / o for t, o in zip(theirs[1:], seconds))}
            print(f"TRL       the same, prompts of {their_lengths[0]:,}: {result['trl_step_seconds']:.2f} s   ratio {result['ratio_trl']:.1f}")
    print(json.dumps({k: v if v is None else float(f"{v:.3g}") for k, v in result.items()}))


def plan(args):
    """The memory plan of a real model in bf16, counted on the meta device: two settings."""
    vlm = random_weights(args.model, "meta")
    vlm.dtype = torch.bfloat16
    settings = {"80 GB card": dict(micro_tokens=16384, cache_tokens=262144, recompute=True),
                "40 GB card": dict(micro_tokens=8192, cache_tokens=131072, recompute=True, offload=True)}
    plans = {name: model.memory_plan(vlm, **how) for name, how in settings.items()}
    print(f"{args.model}, GB{'':14}" + "".join(f"{name:>14}" for name in plans))
    for part in next(iter(plans.values())):
        print(f"{part:32}" + "".join(f"{p[part] / 1e9:10.1f}" + (" CPU" if part == "optimizer" and settings[name].get("offload") else "    ") for name, p in plans.items()))
    print(json.dumps({name: round(p["peak"] / 1e9, 1) for name, p in plans.items()}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["rollout", "search", "train", "plan"])
    parser.add_argument("--model", default="tiny"), parser.add_argument("--random", action="store_true"), parser.add_argument("--device", default="auto")
    parser.add_argument("--prompts", type=int, default=16), parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--image-tokens", type=int, default=0), parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3), parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--micro-tokens", type=int, default=0), parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--step", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name, least in {**dict.fromkeys(("prompts", "group", "new_tokens", "rounds", "turns"), 1), "image_tokens": 0, "micro_tokens": 0}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; expected {least} or more")
    {"rollout": rollout, "search": search, "train": train, "plan": plan}[args.what](args)


if __name__ == "__main__":
    main()
