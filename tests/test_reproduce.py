"""Does appendix/reproduce.md work? Its commands are parsed with the scripts' own flags, and run
from the first to the last on small files in the layouts of the published ones, with the tiny model
in place of the released ones. Its tables are those that `python -m appendix.reproduce` prints.
"""
import json, os, re, shlex, subprocess

import pytest
from PIL import Image

import evaluate
from appendix import reproduce, rl_run, tree_search
from conftest import ROOT, Server, check_mutation, close, names
from test_scripts import script, works                                  # noqa: F401 (a fixture)

# What makes the commands short. It stands behind their own flags, and the last one counts.
SHORT = {
    "evaluate.py": "--n 2 --batch 2 --max-new-tokens 4 --plain",
    "train_sft.py": ("--trees 4 --simulations 2 --rollouts 1 --rollout-steps 2 --depth 2 "
                     "--max-new-tokens 40 --direct 1 --corrected 0 --chains 1"),
    "train_rl.py": ("--steps 1 --num-prompts 2 --group-size 2 --num-minibatches 1 --eval-n 2 "
                    "--max-new-tokens 4 --plain"),
}
SCRIPTS = ("data.py", "train_sft.py", "train_rl.py", "evaluate.py")

def page():
    with open(reproduce.PAGE, encoding="utf-8") as f:
        return f.read()

def sections():
    """{title: its commands}"""
    found, title = {}, None
    everything = reproduce.page_commands()
    for line in page().replace("\\\n", " ").splitlines():
        if line.startswith("## "):
            title = line[3:]
        elif line.startswith("    "):
            n = 1
            loop = re.match(r" +for \w+ in (.+?); do", line)
            if loop:
                n = len(loop[1].split())
            found.setdefault(title, []).extend(everything[:n])
            del everything[:n]
    assert not everything
    return found

def of_ours(commands):
    """(script, its flags) of the commands that run a script of ours."""
    for command in commands:
        for name in SCRIPTS:
            flags = reproduce.flags_of(command, name)
            if flags is not None:
                yield name, flags

# -----------------------------------------------------------------------------
# stand-ins: files in the layouts of the published ones

def picture(root, path, i=0):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 48), (40 * i % 256, 90, 200 - 7 * i % 200)).save(file)
    return path

def lines(root, path, rows):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

def one_json(root, path, rows):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows))

CHOICE = ("<image>\nQuestion: Is it {i}?\nAnswer Choices:\nA. yes\nB. no\n"
          "Answer with the text of the option.")
LETTERS = ("<image>\nWhat is in image {i}?\n(A) a cat\n(B) a dog\n"
           "Answer with the option's letter from the given choices directly.")
CLICK = "<image>\nDescription: check the news {i}"
ACTION = ("<image>\nOBJECTIVE: find question {i}\n\n"
          "PREVIOUS ACTIONS: \n1. type  [INPUT] [] [Questions]\n\nIMAGE:\n")
EVALUATED = {           # ViGoRL's files of questions: what is asked, what is right
    "spatial_reasoning/sat2_test/sat2_test.jsonl": (CHOICE, "yes"),
    "spatial_reasoning/blink/blink_validation.jsonl": (CHOICE, "no"),
    "visual_search/vstar/vstarbench_test.jsonl": (CHOICE, "no"),
    "web_grounding/ScreenSpot-V2/screenspot_v2_test.jsonl": (CLICK, "(0, 0, 63, 47)"),
    "web_grounding/ScreenSpot-Pro/screenspot_pro_test.jsonl": (CLICK, "(0, 0, 63, 47)"),
}
TRAINED = {             # and of RL rows
    "spatial_reasoning/vigorl_sat2_train_RL.jsonl": (CHOICE, "yes"),
    "visual_search/vigorl_SA_RL.jsonl": (LETTERS, "B"),
    "web_grounding/vigorl_osatlas_train_RL.jsonl": (CLICK, "(0, 0, 63, 47)"),
    "web_action/vigorl_ical_train_RL.jsonl": (ACTION, "click [12]"),
    "web_action/vigorl_ical_val_RL.jsonl": (ACTION, "type [3] [red shoes]"),
}
MIG = ("diff", "view_diff", "common_object", "object_tracking", "multi_view", "region",
       "refer_grounding", "group_grounding", "reasoning", "correspondence")

def vigorl_files(root):
    for path, (asked, right) in EVALUATED.items():
        said = lambda i: [{"from": "human", "value": asked.format(i=i)},
                          {"from": "gpt", "value": right}]
        lines(root, path, [
            {"id": i, "image": picture(root, f"{os.path.dirname(path)}/images/{i}.png", i),
             "conversations": said(i)}
            for i in range(4)])
    for path, (asked, right) in TRAINED.items():
        lines(root, path, [
            {"problem": asked.format(i=i), "answer": right,
             "images": [picture(root, f"{os.path.dirname(path)}/images/{i}.png", i)]}
            for i in range(24)])

def univg_files(root):
    places = lambda kind, i: [f"./{picture(root, f'{kind}/images/case{i}_{k}.png', i + k)}"
                              for k in (1, 2)]
    one_json(root, "revised_MIG_bench.json", [
        {"task": task, "images": places("MIG-Bench", i),
         "question": "Locate it in the second image.", "answer": [100, 200, 500, 900],
         "additional_info": "It is in the second image.", "need_format": True}
        for i, task in enumerate(MIG)])
    one_json(root, "stage2_rl.json", [
        {"question": f"<image>\n<image>\nLocate thing {i} in the second image.",
         "answer": [100, 200, 500, 900], "images": places("MGrounding-630k/a", i)}
        for i in range(24)])
    talk = lambda k: [
        {"from": "human", "value": f"Give the box of thing {k}."},
        {"from": "gpt",
         "value": "It's in the second image. <|box_start|>(100,200),(500,900)<|box_end|>"}]
    one_json(root, "MGrounding-630k/gg_train.json", [
        {"id": f"row{i}", "images": places("MGrounding-630k/b", i),
         "conversations": talk(0) + talk(1), "type": "gg_train"}
        for i in range(62)])
    zero = root / "zero-shot"
    frames = [picture(zero, f"video/{k:05}.jpg", k) for k in range(4)]
    box = [5, 5, 40, 30]
    for name in ("lisa_val", "lisa_test"):
        one_json(root, f"zero_shot_evaluation/{name}.json", [
            {"image_path": picture(zero, f"{name}/{i}.jpg", i), "instruction": f"thing {i}",
             "boxes": [box]}
            for i in range(3)])
    one_json(root, "zero_shot_evaluation/LLMSeg_eval.json", [
        {"image_path": picture(zero, f"llm/{i}.jpg", i), "question": f"thing {i}",
         "bbox": [[5, 5], [40, 30]]}
        for i in range(3)])
    one_json(root, "zero_shot_evaluation/ReasonVOS_eval.json", [
        {"image_list": frames[:3], "question": f"thing {i}", "bbox_list": ["[5, 5, 40, 30]"] * 3}
        for i in range(3)])
    one_json(root, "zero_shot_evaluation/ReVOS_eval.json", [
        {"video_id": "video", "frames": [0, 1, 3], "question": f"thing {i}",
         "bbox_list": [box] * 3}
        for i in range(3)])

# -----------------------------------------------------------------------------
# the commands

def reply_of_teacher(text):
    right = re.search(r"\(\d+, ?\d+\), ?\(\d+, ?\d+\)", text)
    return f"<think> It has the same shape. </think>\n<answer> {right[0]} </answer>"

def run_commands(script, tmp_path, monkeypatch, titles):
    """Run the sections' commands in order, shortened. What only luck could bring with so small a
    model is granted: traces of the search end right, and a first step of RL without success does
    not end the run."""
    vigorl_files(tmp_path / "vigorl")
    univg_files(tmp_path / "univg")
    (tmp_path / "LICENSE").write_text("")
    monkeypatch.setattr(tree_search, "outcome", lambda path: float(path.answer is not None))
    monkeypatch.setattr(rl_run, "stop_if_nothing_succeeds", lambda episodes, step: None)
    outputs = []
    with Server(reply_of_teacher) as server:
        for title in titles:
            for command in sections()[title]:
                words = command.split()
                if words[0] in ("pip", "hf", "tar", "unzip"):
                    continue
                if words[0] in ("head", "awk"):
                    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
                    continue
                (name, flags), = of_ours([command])
                flags = " ".join(map(shlex.quote, flags)).replace("http://HOST:8000/v1", server.url)
                flags = re.sub(r"--model qwen2\.5-vl-\db", "--model tiny", flags)
                short = "" if "--compare" in flags else SHORT.get(name, "")
                outputs.append((command, works(script(f"{name} {flags} {short}"))))
    return outputs

SECTIONS = [("SAT-2 and BLINK",), ("V*Bench", "Eight GPUs"), ("ScreenSpot",), ("VisualWebArena",),
            ("MIG-Bench and the zero-shot sets",)]

@pytest.mark.slow
@pytest.mark.parametrize("titles", SECTIONS, ids=" ".join)
def test_the_commands_run(script, tmp_path, monkeypatch, titles):
    """Claim: from the published files to the comparison of before and after, without a step that is
    missing."""
    outputs = run_commands(script, tmp_path, monkeypatch, titles)
    assert any("McNemar's exact p" in out for _, out in outputs)
    for command, out in outputs:
        if "--check" in command.split():
            n, of = re.search(r"(\d+) of (\d+) gold answers would be scored as right", out).groups()
            assert n == of, command
    for command, _ in outputs:
        if "--out" in command:
            folder = re.search(r"--out (\S+)", command)[1]
            assert json.loads((tmp_path / folder / "summary.json").read_text())["n"] == 2

def test_everything_is_run_or_downloaded():
    """Bug: a command of a kind that no test runs; a section that is left out."""
    run = {title for titles in SECTIONS for title in titles}
    for title, commands in sections().items():
        kinds = {command.split()[0] for command in commands}
        assert kinds <= {"pip", "hf", "tar", "unzip", "head", "awk", "python", "torchrun"}
        if list(of_ours(commands)):
            assert title in run or title.startswith(("The figures", "What a run")), title
    assert len(reproduce.page_commands()) > 70

def test_every_command_parses(monkeypatch):
    """Bug: a flag that was renamed, in a section whose run is slow."""
    from appendix import benchmarks, recipes, run
    import train_rl, train_sft
    configs = {"evaluate.py": (evaluate.Config, evaluate.presets),
               "train_sft.py": (train_sft.Config, train_sft.presets),
               "train_rl.py": (train_rl.Config, recipes.presets)}
    seen = set()
    for name, flags in of_ours(reproduce.page_commands()):
        seen.add(name)
        if name == "data.py":
            assert flags[0] == "convert" and flags[1] in benchmarks.CONVERTERS
        elif "--compare" not in flags:
            Config, presets = configs[name]
            run.parse_config(Config, flags, presets=presets)
    assert seen == set(SCRIPTS)

def test_downloads():
    """Claim: the downloads name the released weights as this project does, and use flags that hf
    has."""
    downloads = [shlex.split(c) for c in reproduce.page_commands() if c.startswith("hf ")]
    assert all(words[1] == "download" and re.fullmatch(r"[\w.-]+/[\w.-]+", words[2])
               for words in downloads)
    assert ({w for words in downloads for w in words if w.startswith("--")}
            == {"--repo-type", "--local-dir"})
    from appendix.weights import MODELS
    assert ({MODELS[m].path for m in ("qwen2.5-vl-3b", "qwen2.5-vl-7b")}
            <= {words[2] for words in downloads})

# -----------------------------------------------------------------------------
# the tables

def test_the_tables_are_written(tmp_path, monkeypatch):
    """Claim: --write puts the tables in place of those with the same head, and changes nothing
    else."""
    old = page()
    (tmp_path / "page.md").write_text(re.sub(r"^\| sat2 \| .*$", "| sat2 | old |", old, flags=re.M))
    monkeypatch.setattr(reproduce, "PAGE", str(tmp_path / "page.md"))
    assert page() != old
    reproduce.write_tables([[line for line in table.splitlines()]
                            for table in re.findall(r"(?:^\|.*\n)+", old, re.M)])
    assert page() == old
    with pytest.raises(SystemExit):
        reproduce.write_tables([["| no | such | head |"]])

def test_the_runs_fit_their_card():
    """Claim: the page is for one GPU of 80 GB: each of its runs fits by its own plan, with 7 %
    to spare."""
    cells = [line.split("|")
             for line in page().split("\n| run | model |")[1].split("\n\n")[0].splitlines()[2:]]
    assert (len(cells) == len(reproduce.LENGTHS)
            and all(int(c[3]) <= 0.93 * 80 * 2 ** 30 / 1e9 for c in cells))

def test_the_tables_are_what_the_command_prints(monkeypatch, capsys):
    """Bug: a number of the page that no command prints, or that no longer is true."""
    monkeypatch.setattr("sys.argv", ["reproduce.py"])
    reproduce.main()
    printed = capsys.readouterr().out.splitlines()
    shown = [line for line in page().splitlines() if line.startswith("|")]
    assert [line for line in printed if line] == shown, "run python -m appendix.reproduce --write"

def test_published_figures():
    """Claim: they are those of the long tables of appendix/README.md."""
    with open(os.path.join(ROOT, "appendix", "README.md"), encoding="utf-8") as f:
        long = f.read().split("## Published numbers")[1]
    rows = [line for line in long.splitlines() if line.startswith("|")]
    for row in reproduce.PUBLISHED:
        words = re.sub(r"\\|,.*", "", row.benchmark).lower().split()
        if row.tasks:
            words = ["average of the ten"]
        here = [re.findall(r"\d+(?:\.\d+)?", r)
                for r in rows if all(w in r.lower().replace("\\", "") for w in words)]
        assert any({row.base, row.trained} <= {float(v) for v in numbers} for numbers in here), row

def test_intervals():
    """Claim: Wilson's for a share; for the mean of tasks the normal one, which for one task is the
    textbook's."""
    sat = reproduce.PUBLISHED[0]
    close(reproduce.interval(sat), [100 * v for v in evaluate.wilson(0.629 * 4001, 4001)], 1e-9)
    one = reproduce.Published("x", "y", 0.0, 50.0, 100, ((100, 50.0),))
    close(reproduce.interval(one), [50 - 1.96 * 5, 50 + 1.96 * 5], 1e-9)
    two = reproduce.Published("x", "y", 0.0, 50.0, 200, ((100, 50.0), (100, 50.0)))
    close(reproduce.interval(two)[1] - 50, 1.96 * 5 / 2 ** 0.5, 1e-9)
    mig = next(row for row in reproduce.PUBLISHED if row.tasks)
    assert (mig.n == sum(n for n, _ in mig.tasks)
            and abs(sum(p for _, p in mig.tasks) / 10 - mig.trained) < 0.03)
    assert reproduce.interval(reproduce.Published("x", "y", 1.0, 2.0)) is None

def test_runs_are_those_of_the_page():
    """Claim: the runs, their settings and the model behind a warm start's checkpoint are read off
    the commands."""
    runs = reproduce.training_runs()
    assert (list(runs) == list(reproduce.LENGTHS)
            and runs["univg"][1] == "qwen2.5-vl-7b" and runs["vstar"][1] == "qwen2.5-vl-3b")
    cfg = runs["univg"][0]
    assert (cfg.offload and cfg.micro_tokens == 8192 and cfg.kl_coef == 0.04
            and runs["vstar"][0].num_minibatches == 16)

def test_the_arithmetic_of_a_step(models):
    """Claim: operations, bytes and launches are counted as the docstring says, on a case counted by
    hand."""
    import train_rl
    vlm = models["qwen2.5"]
    cfg = train_rl.Config(num_prompts=2, group_size=4, num_minibatches=1, kl_coef=0.1,
                          recompute=True, max_batch_tokens=1000)
    lengths = reproduce.Lengths(prompt=100, turn=10, crops=1)
    card = reproduce.Card(bandwidth=1e30, flops=1.0, launch=2.0, host=1e30)
    own = 2 * 10 + reproduce.CROP_TOKENS
    text, vision = reproduce.parameter_counts(vlm)
    lm = vlm.model.model.language_model
    assert (text
            == sum(p.numel() for p in lm.layers.parameters()) + vlm.model.lm_head.weight.numel())
    seen = 2 * 100 + 8 * reproduce.CROP_TOKENS
    got = reproduce.step_seconds(vlm, cfg, lengths, card)
    want = {"decode": (200 + 8 * own) / 1000 * 20 * 2.0,
            "prefill": 2 * text * seen,
            "vision": 8 * vision * seen,
            "update": 8 * text * (200 + 8 * own),
            "reference": 2 * text * (200 + 8 * own),
            "optimizer": 0}
    assert list(got) == list(want)
    for part in want:
        assert abs(got[part] - want[part]) <= 1e-6 * max(want[part], 1), part
    spread = reproduce.step_seconds(
        vlm, train_rl.Config(num_prompts=2, group_size=4, num_minibatches=2, recompute=True),
        lengths, card)
    # a prompt is in a minibatch unless none of its 4 is
    close(spread["update"], 8 * text * (2 * 2 * (1 - 0.5 ** 4) * 100 + 8 * own), 1e-9)
    assert spread["reference"] == 0

def test_disk(models):
    """Claim: what a run writes: the warm start and the reference (weights), two checkpoints
    (weights and 12 bytes per trained parameter)."""
    import train_rl
    vlm = models["qwen2.5"]
    weights = sum(p.nbytes for p in vlm.model.parameters()) / 1e9
    checkpoint = weights + 12 * sum(p.numel() for p in vlm.parameters()) / 1e9
    got = reproduce.disk_gb(vlm, train_rl.Config(kl_coef=0.1), reproduce.Lengths(1, 1, data_gb=3.0))
    close(got - 6, 3 * weights + 2 * checkpoint, 1e-6)

# -----------------------------------------------------------------------------
# do the tests bite?

MUTATIONS = [
    ("appendix.reproduce:step_seconds", "lengths.crops + 1",
     "lengths.crops", test_the_arithmetic_of_a_step),
    ("appendix.reproduce:step_seconds", "(1 - 1 / m) ** cfg.group_size",
     "1 / m", test_the_arithmetic_of_a_step),
    ("appendix.reproduce:disk_gb", "2 * checkpoint", "checkpoint", test_disk),
    ("appendix.reproduce:interval", "len(row.tasks)", "1", test_intervals),
    ("appendix.reproduce:training_runs", "models.get(cfg.model, cfg.model)",
     "cfg.model", test_runs_are_those_of_the_page),
]

@pytest.mark.parametrize("target, old, new, test", MUTATIONS, ids=names(MUTATIONS))
def test_mutations(target, old, new, test, models):
    check_mutation(target, old, new, test, {}, {"models": lambda: models})
