"""Do the comparisons of appendix/speed.py run, and does `speed gpu` keep what it measured when a
part fails? Numbers of seconds are not tested, because machines differ; what they are made of is.
"""
import contextlib, json, os, sys, time, types

import pytest
import torch

import zoom_rollout
from appendix import graphs, speed, speed_gpu, speed_setup
from conftest import check_mutation, close, names

A_CUDA_TEST = "import pytest\n\n@pytest.mark.cuda\ndef test_it():\n    pass\n"

@pytest.fixture(autouse=True)
def few_cuda_tests(tmp_path, monkeypatch):
    """One small file stands for the project's own tests."""
    (tmp_path / "test_small.py").write_text(A_CUDA_TEST)
    monkeypatch.setattr(speed_gpu, "cuda_test_files", lambda: [str(tmp_path / "test_small.py")])

def run(command, monkeypatch, capsys):
    """-> (status, the JSON object of stdout's last line, stdout and stderr)"""
    monkeypatch.setattr(sys, "argv", ["speed.py", *command.split()])
    status = 0
    try:
        speed.main()
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    return status, json.loads(out.splitlines()[-1]) if out else None, out + err

# -----------------------------------------------------------------------------
# the commands

@pytest.mark.parametrize("command, keys", [
    ("rollout --prompts 1 --group 2 --new-tokens 6 --rounds 1",
     {"ratio_hf", "ratio_hf_zoom", "prefill_tokens_saved"}),
    ("train --prompts 1 --group 2 --new-tokens 6 --rounds 1 --recompute",
     {"packed_speedup", "step_seconds"}),
    pytest.param("train --model mid --prompts 1 --group 2 --new-tokens 3 --rounds 1 "
                 "--image-tokens 4 --no-step",
                 {"packed_speedup"}, marks=pytest.mark.slow)])
def test_a_comparison_runs(monkeypatch, capsys, command, keys):
    """Bug: a benchmark that nothing runs calls a function that was renamed."""
    status, result, _ = run(command, monkeypatch, capsys)
    assert status == 0 and all(result[key] > 0 for key in keys)
    assert result.get("max_logprob_gap", 0) < 1e-3 and result.get("max_grad_gap", 0) < 1e-3

def test_enlarged_questions(models):
    """Claim: with --image-tokens the images are fed at that size, whatever the size of the model's
    own scenes."""
    vlm, samples = speed_setup.toy_questions(models["qwen2.5"], 2, 36)
    assert [zoom_rollout.begin(vlm, s).ids.count(vlm.image_token) for s in samples] == [36, 36]

# -----------------------------------------------------------------------------
# speed gpu

@pytest.mark.slow
def test_the_whole_on_a_cpu(monkeypatch, capsys):
    """Claim: the rehearsal measures every part that does not need a GPU; its tables are Markdown,
    its last line is JSON."""
    status, result, out = run("gpu --shape tiny --device cpu", monkeypatch, capsys)
    assert status == 0 and result["failed"] == {} and result["shape"] == "tiny"
    parts = result["parts"]
    assert list(parts) == ["card", "tests", "model", "decode", "rollout", "update", "step"]
    assert ([line.removeprefix("### ") for line in out.splitlines() if line.startswith("### ")]
            == [part.name for part in speed_gpu.PARTS])
    assert (out.count("Not measured: this part needs a GPU.") == 2
            and out.count("| | |\n|---|---|\n| ") >= 8)
    assert parts["tests"]["passed"] == 1 and parts["card"]["copy_bytes_per_second"] > 1e6
    for setting in ("cudnn", "no_cudnn"):
        assert all(parts["rollout"][f"{side}_tokens_per_second_{setting}"] > 0
                   for side in ("ours", "generate"))
    assert parts["decode"]["step_milliseconds"] > 0 and parts["update"]["packed_cudnn_seconds"] > 0
    step = parts["step"]
    assert step["prompts"] == 2 and step["planned_gb"] > 0
    close(step["seconds_of_128_prompts"], step["step_seconds"] * 128 / 2, 0.01)
    close(step["step_seconds"],
          sum(step[f"{part}_seconds"] for part in ("rollout", "reward", "reference", "update")),
          0.02)

def break_parts(monkeypatch, **measures):
    """Put functions in place of the measurements of some parts; they may take a second."""
    parts = [speed_gpu.Part(p.name, 1, measures[p.name]) if p.name in measures else p
             for p in speed_gpu.PARTS]
    monkeypatch.setattr(speed_gpu, "PARTS", parts)

def no_memory(bench, found):
    found["before"] = 1
    raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

def endless(bench, found):
    found["before"] = 2
    while True:
        try:
            time.sleep(0.01)
        except Exception:
            pass

@pytest.mark.slow
def test_ours_outlives_the_peer(monkeypatch, capsys):
    """Claim: where `generate` lacks memory, our own rollouts have been measured."""
    monkeypatch.setattr(speed_gpu.speed_peers, "generate_turns",
                        lambda vlm, load, r: no_memory(None, {}))
    status, result, out = run("gpu --shape tiny --device cpu", monkeypatch, capsys)
    assert status == 1 and set(result["failed"]) == {"rollout"}
    assert all(result["parts"]["rollout"][f"ours_tokens_per_second_{setting}"] > 0
               for setting in ("cudnn", "no_cudnn"))

def wrong(bench, found):
    raise SystemExit(2)

@pytest.mark.slow
def test_what_a_failure_leaves(monkeypatch, capsys):
    """Claim: a part that lacks memory, one that never ends and one that leaves the program are
    noted in one line each, with what they had measured; the parts after them run. The status says
    that something failed."""
    break_parts(monkeypatch, decode=no_memory, rollout=endless, tests=wrong)
    status, result, out = run("gpu --shape tiny --device cpu", monkeypatch, capsys)
    assert status == 1 and set(result["failed"]) == {"decode", "rollout", "tests"}
    assert result["parts"]["decode"]["before"] == 1 and result["parts"]["rollout"]["before"] == 2
    assert result["parts"]["rollout"]["seconds"] == pytest.approx(1, abs=0.5)
    assert (result["parts"]["update"]["packed_seconds"] > 0
            and result["parts"]["step"]["step_seconds"] > 0)
    notes = [line for line in out.splitlines() if line.startswith("Not finished after")]
    assert (len(notes) == 3 and "Tried to allocate 2 GiB" in notes[1]
            and "its time was over" in notes[2])

def test_cudnn_is_off_and_on_again(monkeypatch):
    """Claim: cuDNN's attention is off in a part unless it turns it on; afterwards the setting is as
    before, even after an error."""
    seen = []

    def look(bench, found):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        with speed_gpu.cudnn_attention(True):
            seen.append(torch.backends.cuda.cudnn_sdp_enabled())
            raise ValueError
    for before in (True, False):
        with speed_gpu.cudnn_attention(before):
            assert "ValueError" in speed_gpu.run_part(speed_gpu.Part("p", 5, look), None, {})
            assert torch.backends.cuda.cudnn_sdp_enabled() == before
    assert seen == [False, True] * 2

@pytest.mark.slow
def test_without_a_model(monkeypatch, capsys):
    """Claim: where the model cannot be made, its parts say so, and what was measured before
    stands."""
    break_parts(monkeypatch, model=no_memory)
    status, result, _ = run("gpu --shape tiny --device cpu", monkeypatch, capsys)
    assert (status == 1 and result["parts"]["card"]["card"] == "CPU"
            and set(result["failed"]) == {"model", "decode", "rollout", "update", "step"})
    assert "no model" in result["failed"]["step"]

def test_a_failing_cuda_test_is_named(tmp_path):
    """Claim: the report names the test; a failing test is a failed part."""
    (tmp_path / "test_small.py").write_text(
        A_CUDA_TEST.replace("pass", "assert False"))
    found = {}
    with pytest.raises(RuntimeError, match="status 1"):
        speed_gpu.run_cuda_tests(speed_gpu.Bench("cpu"), found)
    assert found["failed"] == 1 and "test_small.py::test_it" in found["failures"][0]

def test_the_cuda_tests_are_found(monkeypatch):
    """Bug: the tests for a GPU move, and the day a GPU is there nothing runs."""
    monkeypatch.undo()
    assert ({"test_prefix.py", "test_zoom_rollout.py"}
            <= {os.path.basename(path) for path in speed_gpu.cuda_test_files()})

@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without")
@pytest.mark.parametrize("command", ["gpu", "gpu --shape qwen2.5-vl-3b", "gpu --device cpu"])
def test_without_a_gpu(monkeypatch, capsys, command):
    """Claim: one line that says what to do, status 2."""
    status, result, out = run(command, monkeypatch, capsys)
    assert (status == 2 and result is None and out.count("\n") == 1
            and "--shape tiny --device cpu" in out)

def test_the_parts_fit_into_nine_minutes():
    assert sum(part.seconds for part in speed_gpu.PARTS) <= 530

@pytest.mark.parametrize("card, cpu, model, offload", [
    (141, 1000, "qwen2.5-vl-3b", False),
    (80, 1000, "qwen2.5-vl-3b", False),
    (40, 1000, "qwen2.5-vl-3b", True),
    (40, 32, "qwen2.5-vl-3b-short", False),
    (24, 1000, "qwen2.5-vl-3b-short", True)])
def test_the_shape_fits_the_card(card, cpu, model, offload):
    """Claim: the largest shape that the memory plan allows, on cards of 24 GiB and more; masters on
    the CPU only where there is room."""
    chosen = speed_gpu.choose_shape(card * 2 ** 30, cpu * 2 ** 30)
    assert (chosen.model, chosen.offload) == (model, offload)
    vlm = speed_setup.random_weights(chosen.model, "meta")
    assert speed_gpu.step_plan(
        vlm, chosen, chosen.image_tokens + speed_gpu.TEXT_TOKENS)["peak"] < card * 2 ** 30

def test_bandwidth():
    """Bug: a card's name is part of another's."""
    peaks = {card: speed_gpu.peak_bandwidth(card)
             for card in ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe",
                          "NVIDIA L40S", "NVIDIA A100-SXM4-40GB", "NVIDIA A10G",
                          "NVIDIA GH200 480GB", "Other")}
    assert list(peaks.values()) == [4.8e12, 3.35e12, 2.0e12, 0.864e12, 1.56e12, 0.6e12, 4.0e12,
                                    None]

def test_bytes_of_a_decoding_step(models):
    """Claim: the weights of the text layers and of the head, and the slots as the cache stores
    them."""
    vlm = models["qwen2.5"]
    cache = vlm.new_cache(3)
    with torch.no_grad():
        vlm.prefill(cache, [[5, 6], [7, 8], [9, 10]], [0, 0, 0])
    stored = sum(block.nbytes for block in cache.keys + cache.values)
    assert speed_setup.decode_bytes(vlm, 6) - speed_setup.decode_bytes(vlm, 0) == stored
    lm = vlm.model.model.language_model
    assert (speed_setup.decode_bytes(vlm, 0)
            == sum(p.nbytes for p in lm.layers.parameters()) + vlm.model.lm_head.weight.nbytes)

def test_every_turn_zooms(models):
    """Claim: in the measured step each episode samples its full turns, and all but the last end
    with a crop."""
    shape = speed_gpu.Shape("tiny", 4096, 65536, image_tokens=0, group=2, zooms=2, turn_tokens=3,
                            step_prompts=2)
    vlm, samples = speed_setup.toy_questions(models["qwen2.5"], 2, 0)
    vlm = speed_setup.share_weights(vlm, speed_setup.EndlessVLM)
    weights = [p.detach().clone() for p in vlm.parameters()]
    steps = speed_gpu.ZoomSteps(vlm, samples, speed_gpu.step_config(shape))
    steps.next()
    for p, w in zip(vlm.parameters(), weights):
        p.data.copy_(w)
    assert [(len(e.turns), len(e.views), sum(e.completion_mask), e.finish_reason)
            for e in steps.episodes] == [(3, 3, 9, "answer")] * 4
    assert (all(t.crop for e in steps.episodes for t in e.turns[:-1])
            and zoom_rollout.env_step.__name__ == "env_step")

def bench_on_a_cpu():
    bench = speed_gpu.Bench("cpu", speed_gpu.TINY)
    speed_gpu.make_model(bench, {})
    return bench

def test_graphs_without_a_gpu(monkeypatch):
    """Claim: the part about graphs decodes through the captured step (here: one that stands for it)
    and through the plain one."""
    captured = []

    def capture(vlm, cache, step):
        captured.append(len(cache.lengths))
        return step
    monkeypatch.setattr(graphs, "captured_decode_step", capture)
    found = {}
    speed_gpu.measure_graphs(bench_on_a_cpu(), found)
    # two turns of the decoding, three rounds
    assert len(captured) == 2 + 3 and set(captured) == {4}
    assert min(found["ratio"], found["graphs_tokens_per_second"],
               found["eager_tokens_per_second"]) > 0

def test_kernels_per_step(monkeypatch):
    """Claim: launches and waits of the runtime are counted, copies and the kernels themselves are
    not; the prompt's share is taken off."""
    tokens = []

    @contextlib.contextmanager
    def profile(activities):
        events = lambda: [types.SimpleNamespace(key=key, count=n) for key, n in (
            ("cudaLaunchKernel", 100 + 5 * tokens[-1]),
            ("cuLaunchKernelEx", 10 + tokens[-1]),
            ("cudaLaunchKernelExC", 2 * tokens[-1]),
            ("cudaStreamSynchronize", 3 + tokens[-1] // 8),
            ("void gemm_kernel", 7 * tokens[-1]),
            ("cudaMemcpyAsync", tokens[-1]))]
        yield types.SimpleNamespace(key_averages=events)
    monkeypatch.setattr(torch.profiler, "profile", profile)
    monkeypatch.setattr(speed_setup, "our_turns",
                        lambda vlm, load, seed: tokens.append(load.turn_tokens))
    found = {}
    speed_gpu.count_kernels(bench_on_a_cpu(), found)
    assert found == {"kernels_per_step": 8, "waits_per_step": 1 / 8}

# -----------------------------------------------------------------------------
# do the tests bite?

MUTATIONS = [
    ("appendix.speed_gpu:zoom_anyway", "zooms_left > 0", "zooms_left > 1", test_every_turn_zooms),
    ("appendix.speed_setup:decode_bytes", "2 * text.num_hidden_layers",
     "text.num_hidden_layers", test_bytes_of_a_decoding_step),
    ("appendix.speed_gpu:choose_shape", "0.7 * cpu_bytes",
     "70 * cpu_bytes", test_the_shape_fits_the_card),
    ("appendix.speed_gpu:choose_shape", "0.92 * card_bytes",
     "9.2 * card_bytes", test_the_shape_fits_the_card),
    ("appendix.speed_setup:toy_questions", "round(image_tokens ** 0.5)",
     "len(samples)", test_enlarged_questions),
]

@pytest.mark.parametrize("target, old, new, test", MUTATIONS, ids=names(MUTATIONS))
def test_mutations(target, old, new, test, models):
    arguments = (dict(card=40, cpu=32, model="qwen2.5-vl-3b-short", offload=False)
                 if test is test_the_shape_fits_the_card else {})
    check_mutation(target, old, new, test, arguments, {"models": lambda: models})
