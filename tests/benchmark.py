"""Speed against a peer, in the same run, on the same weights and prompts.

    python tests/benchmark.py rollout                                  # the tiny model in the default world
    python tests/benchmark.py rollout --prompts 2 --image-tokens 1024 --new-tokens 64
    python tests/benchmark.py rollout --model qwen2.5-vl-3b --prompts 8 --image-tokens 1024 --new-tokens 512 --device cuda

rollout: sampled tokens per second of our sampler and of transformers' `generate`, end of turn disabled so that both do equal
work; then two zoom turns, against a loop around `generate` that sends the whole conversation again each turn, as the papers'
code and TRL do. Rounds alternate; a ratio is the median over rounds. The last line is one JSON object.
"""
import argparse, json, os, random, statistics, sys, time

import torch
from PIL import Image

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data, model, zoom_rollout


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


def ours(vlm, samples, group, new_tokens, turns, seed):
    """zoom_rollout's parts with turns of a fixed length. -> conversations [(ids, views)] and the tokens sampled."""
    rng, u = random.Random(seed), torch.rand(len(samples) * group, turns, new_tokens, dtype=torch.double).to(vlm.device)
    prompts = [zoom_rollout.begin(vlm, s) for s in samples]
    talks = [(list(e.ids), list(e.views)) for e in prompts for _ in range(group)]
    cache = vlm.new_cache(len(prompts))
    logits, starts = vlm.extend(cache, [e.ids for e in prompts], [0] * len(prompts), [v for e in prompts for v in e.views])
    share = [p for p in range(len(prompts)) for _ in range(group)]
    cache, logits, starts = cache.share(torch.tensor(share, device=vlm.device)), logits[share], [starts[p] for p in share]
    for t in range(turns):
        said, _, starts = zoom_rollout.sample_turn(vlm, cache, logits, starts, u[:, t], 1.0, new_tokens)
        if t + 1 < turns:
            seen = [observation(vlm, views[0], rng) for _, views in talks]
            logits, starts = vlm.extend(cache, [[s[-1]] + ids for s, (ids, _) in zip(said, seen)], starts, [crop for _, crop in seen])
            talks = [(ids + s + more, views + [crop]) for (ids, views), s, (more, crop) in zip(talks, said, seen)]
    return len(talks) * turns * new_tokens


def theirs(vlm, samples, group, new_tokens, turns, seed):
    """The same with `generate`: every member of the group brings its own image, every turn sends everything again."""
    rng, pad = random.Random(seed), vlm.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    talks = [(list(e.ids), list(e.views)) for e in (zoom_rollout.begin(vlm, s) for s in samples for _ in range(group))]
    for t in range(turns):
        width = max(len(ids) for ids, _ in talks)
        ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids, _ in talks], device=vlm.device)               # left padding
        views = [v for _, views in talks for v in views]
        for v in views:
            vlm.patchify(v)
        out = vlm.model.generate(
            input_ids=ids, attention_mask=(ids != pad).long(), mm_token_type_ids=(ids == vlm.image_token).long(),
            pixel_values=torch.cat([v.patches for v in views]).to(vlm.device, vlm.dtype), image_grid_thw=torch.tensor([v.grid for v in views], device=vlm.device),
            do_sample=True, top_k=0, top_p=1.0, temperature=1.0, min_new_tokens=new_tokens, max_new_tokens=new_tokens,
            suppress_tokens=vlm.unsayable.tolist(), pad_token_id=pad)
        if t + 1 < turns:
            seen = [observation(vlm, views[0], rng) for _, views in talks]
            talks = [(ids + s + more, views + [crop]) for (ids, views), s, (more, crop) in zip(talks, out[:, width:].tolist(), seen)]
    return len(talks) * turns * new_tokens


def speed(vlm, f, *args):
    began = time.perf_counter()
    n = f(vlm, *args)
    if vlm.device.type == "cuda":
        torch.cuda.synchronize()
    return n / (time.perf_counter() - began)


def rollout(args):
    vlm = model.load(args.model, args.device)
    samples = questions(vlm, args.prompts, args.image_tokens)
    vlm.unsayable = torch.cat([vlm.unsayable, torch.tensor([vlm.im_end], device=vlm.device)])
    result = {}
    for turns in (1, 3):
        speeds = {ours: [], theirs: []}
        for r in range(args.rounds + 1):                                       # the first round warms up
            for f, values in speeds.items():
                values.append(speed(vlm, f, samples, args.group, args.new_tokens // turns, turns, r))
        a, b = (statistics.median(v[1:]) for v in speeds.values())
        ratio = statistics.median(x / y for x, y in zip(speeds[ours][1:], speeds[theirs][1:]))
        print(f"{'one turn' if turns == 1 else 'two zooms':10s} ours {a:9,.0f} tokens/s   generate {b:9,.0f} tokens/s   ratio {ratio:.1f}")
        result |= {"ours_tokens_per_second": a, "hf_tokens_per_second": b, "ratio_hf": ratio} if turns == 1 else {"ratio_hf_zoom": ratio}
    print(json.dumps({k: round(v, 2) for k, v in result.items()}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["rollout"])
    parser.add_argument("--model", default="tiny"), parser.add_argument("--device", default="auto")
    parser.add_argument("--prompts", type=int, default=16), parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--image-tokens", type=int, default=0), parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    rollout(parser.parse_args())


if __name__ == "__main__":
    main()
