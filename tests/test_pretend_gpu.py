"""Would a GPU refuse this, or be slow at it? The tiny model in bf16 on a pretend GPU
(pretend_gpu.py), one process per activity; it takes minutes, so it runs with --slow.
"""
import json, os, subprocess, sys

import pytest

from conftest import ROOT

pytestmark = pytest.mark.slow

# Lines that run once per token, so that the GPU must never be waited for there:
# {file: the functions}.
PER_TOKEN = {"model.py": ("attend", "decode_step", "forward", "layer", "place"),
             "prefix.py": ("attend", "place"),
             "zoom_rollout.py": ("sample_tokens",),
             "attention.py": ("attend", "attend_continued")}

def seen_by(activity):
    """-> {"attention": {"file:line dtype sm80 sm90": calls},
        "waits": {"operation file:line": number}}"""
    command = [sys.executable, os.path.join(ROOT, "tests", "pretend_gpu.py"), activity]
    done = subprocess.run(command, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])

def slow_calls(attention):
    return [call for call in attention if "bfloat16" in call and "math" in call]

def lines_of(file, functions):
    """{"file:line"} of the bodies of these functions."""
    import ast
    path = os.path.join(
        ROOT, file if os.path.exists(os.path.join(ROOT, file)) else f"appendix/{file}")
    with open(path, encoding="utf-8") as f:
        tree = ast.parse(f.read())
    found = [node for node in ast.walk(tree)
             if isinstance(node, ast.FunctionDef) and node.name in functions]
    assert {node.name for node in found} == set(functions), "a function has another name by now"
    spans = [range(node.lineno, node.end_lineno + 1) for node in found]
    return {f"{file}:{line}" for span in spans for line in span}

@pytest.mark.parametrize("activity, kernels", [
    ("rl", {"flash", "efficient"}), ("univg", {"flash"}), ("search", {"flash", "efficient"}),
    ("sft", {"flash"}), ("evaluate", {"flash", "efficient"})])
def test_no_mix_and_no_slow_kernel(activity, kernels):
    """Claim: no tensor of the CPU meets one of the GPU; attention in bf16 has a kernel that stores
    no scores, on an A100 and on Hopper; and no token waits for the host."""
    seen = seen_by(activity)
    assert seen["attention"] and not slow_calls(seen["attention"])
    chosen = {call.split()[i] for call in seen["attention"] for i in (2, 3)}
    assert chosen == kernels, seen["attention"]
    per_token = set().union(*(lines_of(file, functions) for file, functions in PER_TOKEN.items()))
    assert not [wait for wait in seen["waits"] if wait.split()[-1] in per_token]

def test_a_mix_is_refused():
    with pytest.raises(AssertionError, match="mixes devices"):
        seen_by("mix")

def test_a_slow_kernel_is_seen():
    assert slow_calls(seen_by("math")["attention"])
