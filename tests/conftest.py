"""Shared by the tests: two random tiny models, one of each family, the `slow` and `cuda` markers,
and a way to put a bug into a source file. The models are random, not the shipped checkpoint: what a
test here claims holds for any weights.
"""
import ast, contextlib, copy, http.server, importlib, inspect, json, os, re, sys, textwrap
import threading, time, types

import pytest
import torch
import transformers

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import data, model
from appendix import endpoint, prefix, tiny, weights

torch.set_num_threads(1)

# -----------------------------------------------------------------------------
# markers

def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")

def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; runs with --slow only")
    config.addinivalue_line("markers", "cuda: runs only where there is a CUDA GPU")

def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.name.startswith("test_mutations"):              # see test_planting.py
            item.add_marker("slow")
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: run with --slow"))
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))

# -----------------------------------------------------------------------------
# models

def tiny_qwen2_5():
    return tiny.make_tiny(
        [data.prompt(s)[1] for task in data.TASKS[:4] for s in data.toy(task, "train", 10)],
        data.PHRASES)

def tiny_qwen3():
    """Qwen3-VL by hand: other patches (16), coordinates (0-1000), rotary layout (interleaved), and
    deepstack. Its crops are enlarged, window 80 -> side 128, and its window divides no image
    side."""
    base = tiny_qwen2_5()
    of = dict(zip(
        ("image", "video", "vision_start", "vision_end"),
        base.tokenizer.convert_tokens_to_ids(
            ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"])))
    config = transformers.Qwen3VLConfig(
        text_config=dict(
            vocab_size=len(base.tokenizer), hidden_size=64, intermediate_size=96,
            num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
            tie_word_embeddings=True, max_position_embeddings=4096,
            rope_parameters={"rope_type": "default", "mrope_section": [6, 5, 5],
                             "rope_theta": 100.0}),
        vision_config=dict(
            depth=3, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64,
            patch_size=16, num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
        tie_word_embeddings=True, **{f"{name}_token_id": token for name, token in of.items()})
    torch.manual_seed(0)
    net = transformers.Qwen3VLForConditionalGeneration(config)
    # with transformers' 0.02 all logits are alike and nothing shows
    for p in net.parameters():
        if p.ndim >= 2:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    spec = model.Spec("nowhere", "thousand", 128 * 128, 80, 128, 64 * 64)
    processor = weights.Qwen2VLImageProcessorPil(
        patch_size=16, size={"shortest_edge": 64 * 64, "longest_edge": 128 * 128})
    return prefix.PrefixVLM(net, base.tokenizer, processor, "tiny-qwen3", spec)

FAMILIES = {"qwen2.5": tiny_qwen2_5, "qwen3": tiny_qwen3}

@pytest.fixture(scope="session")
def models():
    """{family: VLM} in float32"""
    return {family: make() for family, make in FAMILIES.items()}

@pytest.fixture(scope="session")
def models64(models):
    """The same weights in float64; transformers' norms would compute in float32 whatever they are
    given."""
    out = {}
    for family, single in models.items():
        net = copy.deepcopy(single.model).double()
        for m in net.modules():
            if type(m).__name__.endswith("RMSNorm"):
                m.forward = types.MethodType(
                    lambda m, x: torch.nn.functional.rms_norm(
                        x, x.shape[-1:], m.weight, m.variance_epsilon),
                    m)
        # transformers stretches them in float32; test_tower.py tests them
        if hasattr(net.model.visual, "pos_embed"):
            net.model.visual.pos_embed.weight.data.zero_()
        out[family] = prefix.PrefixVLM(
            net, single.tokenizer, single.processor, single.name, single.spec)
        assert out[family].dtype == torch.float64
    return out

@pytest.fixture(scope="session", params=FAMILIES)
def family(request):
    return request.param

@pytest.fixture(scope="session")
def vlm(models, family):
    return models[family]

@pytest.fixture(scope="session")
def vlm64(models64, family):
    """Use it with the fixture float64, or inside all_in_float64()."""
    return models64[family]

@contextlib.contextmanager
def all_in_float64():
    """Default dtype float64, and `.float()`, which the code says where bf16 would be too coarse,
    does not lose bits either."""
    before, single = torch.get_default_dtype(), torch.Tensor.float
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        torch.Tensor.float = single

@pytest.fixture
def float64():
    with all_in_float64():
        yield

# -----------------------------------------------------------------------------
# an endpoint

class Server:
    """An OpenAI-compatible endpoint on loopback. `misbehave(n)`, for the n-th request for a
    completion, may name what goes wrong."""
    def __init__(self, reply, misbehave=lambda n: None):
        self.asked, lock = [], threading.Lock()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def send(self, body, status=200, length=None):
                self.send_response(status)
                self.send_header("Content-Length", str(len(body) if length is None else length))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self):
                self.send(json.dumps({"data": [{"id": "big-model"}]}).encode())

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.asked.append(body)
                    fault = misbehave(len(server.asked))
                text = body["messages"][0]["content"][-1]["text"]
                good = json.dumps({"choices": [{"message": {"content": reply(text)}}]}).encode()
                if fault == "late":
                    time.sleep(0.9)
                if isinstance(fault, int):
                    return self.send(b"no " * 500, fault)
                if fault == "cut":
                    return self.send(good[:20], length=len(good))
                with contextlib.suppress(OSError):                  # whom it was for has gone
                    self.send({
                        "not json": b"<html>",
                        "no choices": b'{"choices": []}',
                        "no text": b'{"choices": [{"message": {"content": null}}]}',
                    }.get(fault, good))

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

@pytest.fixture
def hurry(monkeypatch):
    # the late server stays late
    monkeypatch.setattr(
        endpoint.time, "sleep", lambda s, sleep=time.sleep: sleep(s if s == 0.9 else 0))

# -----------------------------------------------------------------------------
# numbers and mutants

def close(got, want, tolerance):
    """Equal within tolerance * the size of what is expected; nan is never equal, and an expectation
    of zeros is refused."""
    got, want = torch.as_tensor(got).detach().double(), torch.as_tensor(want).detach().double()
    scale = want.abs().max().item()
    assert scale > 0 and got.shape == want.shape
    error = (got - want).abs().max().item()
    assert error <= tolerance * scale, f"off by {error:.2g}, scale {scale:.2g}"

# What a planted bug may end in; a NameError, say, is a bug of the mutation itself.
RED = (AssertionError, ArithmeticError, RuntimeError, IndexError, OSError, ValueError, SystemExit,
       pytest.fail.Exception)

green = set()                           # (test, arguments) that passed without a bug


def parse_code(code):
    """Source of one expression or of statements -> ("expression", node) or
    ("statements", [nodes])."""
    body = ast.parse(textwrap.dedent(code).strip()).body
    if len(body) == 1 and isinstance(body[0], ast.Expr):
        return "expression", body[0].value
    return "statements", body


def tree_of(module_name):
    """The syntax tree of the module's file."""
    with open(importlib.import_module(module_name).__file__, encoding="utf-8") as f:
        return ast.parse(f.read())


class Planter(ast.NodeTransformer):
    """Replaces `old` by `new` wherever it stands, compared as syntax trees; counts how often."""
    def __init__(self, old, new):
        self.kind, self.old = parse_code(old)
        _, self.new = parse_code(new)
        if self.kind == "statements" and not isinstance(self.new, list):
            self.new = [ast.Expr(self.new)]
        self.found = 0

    def same(self, node, other):
        # Load and Store do not matter: an expression may stand on the left side.
        if type(node) is not type(other):
            return False
        return (re.sub(r"ctx=\w+\(\)", "", ast.dump(node))
                == re.sub(r"ctx=\w+\(\)", "", ast.dump(other)))

    def visit(self, node):
        if self.kind == "expression" and isinstance(node, ast.expr) and self.same(node, self.old):
            self.found += 1
            # `new` may be the same kind of thing only: an expression, or None for a bare statement.
            return ast.copy_location(
                copy.deepcopy(self.new if isinstance(self.new, ast.expr) else ast.Constant(None)),
                node)
        node = self.generic_visit(node)
        if self.kind == "statements":
            for field in ("body", "orelse", "finalbody"):
                block = getattr(node, field, None)
                if isinstance(block, list):
                    setattr(node, field, self.replace_in(block))
        return node

    def replace_in(self, block):
        n = len(self.old)
        out, i = [], 0
        while i < len(block):
            part = block[i:i + n]
            if len(part) == n and all(map(self.same, part, self.old)):
                self.found += 1
                out += copy.deepcopy(self.new)
                i += n
            else:
                out.append(block[i])
                i += 1
        return out


def find_definition(tree, path):
    """The node of a function or class "Class.method", or of the module-level statement that assigns
    the name."""
    node = tree
    for name in path.split("."):
        for child in ast.walk(node) if node is not tree else node.body:
            if (child is not node and isinstance(child, (ast.FunctionDef, ast.ClassDef))
                    and child.name == name):
                node = child
                break
            if (isinstance(child, ast.Assign)
                    and any(isinstance(t, ast.Name) and t.id == name for t in child.targets)):
                return child
        else:
            raise AssertionError(f"there is no {path}: update MUTATIONS")
    return node


@contextlib.contextmanager
def planted(target, old, new, patch):
    """Within the block, `old` in the function `target` ("module:Class.method") reads `new`.

    A function keeps its identity and gets another code object, so whoever imported it sees the bug.
    A module-level statement is run again in the module; names that other modules imported from it
    keep the old value."""
    module_name, path = target.split(":")
    module = importlib.import_module(module_name)
    tree = tree_of(module_name)
    definition = find_definition(tree, path)
    planter = Planter(old, new)
    planter.visit(definition)
    assert planter.found == 1, (
        f"{old!r} stands in {target} {planter.found} times, expected once: update MUTATIONS")
    ast.fix_missing_locations(tree)
    made = types.ModuleType(module_name)
    made.__file__ = module.__file__
    if isinstance(definition, ast.FunctionDef):
        code = compile(tree, f"{target} with a bug", "exec")
        for name in path.split("."):
            code = next(c for c in code.co_consts
                        if isinstance(c, types.CodeType) and c.co_name == name)
        live = module
        for name in path.split("."):
            live = inspect.getattr_static(live, name)
        live = getattr(live, "__func__", live)                 # staticmethod, classmethod
        # property; torch.no_grad() and the like
        live = inspect.unwrap(getattr(live, "fget", live))
        patch.setattr(live, "__code__", code)
    else:
        real = sys.modules[module_name]
        sys.modules[module_name] = made                        # dataclasses look their module up
        try:
            exec(compile(tree, f"{target} with a bug", "exec"), made.__dict__)
        finally:
            sys.modules[module_name] = real
        patch.setattr(module, path.split(".")[0], getattr(made, path.split(".")[0]))
    try:
        yield
    finally:
        patch.undo()


def check_mutation(target, old, new, test, arguments, fixtures):
    """The test is green with the code as it is, and red with the bug planted. fixtures: {name:
    function that makes what the test asks for beyond its arguments}; they are made anew, with the
    bug in place."""
    wants = [name for name in inspect.signature(test).parameters if name not in arguments]

    def run_test():
        with all_in_float64() if "float64" in wants else contextlib.nullcontext():
            test(**arguments, **{name: made[name]() for name in wants})

    made = {"float64": lambda: None, **fixtures}
    key = test, repr(arguments)
    if key not in green:
        run_test()
        green.add(key)
    with pytest.MonkeyPatch.context() as own, planted(target, old, new, own), pytest.raises(RED):
        run_test()


def names(mutations):
    """Ids for pytest: what is changed into what, in one line."""
    return [f"{target} {' '.join(old.split())} -> {' '.join(new.split())}"
            for target, old, new, *_ in mutations]
