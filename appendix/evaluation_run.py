"""The parts of evaluate.py that are not about measuring: flags, questions, files, table, page.

`cfg` is evaluate.Config.
"""
import contextlib
import json
import os
import random
import threading
from dataclasses import asdict, fields, replace

import data
from appendix import files, memory, ranks, run, weights
from appendix.episode_rows import record, restore
from appendix.files import DataError
from model import is_tiny
from zoom_rollout import RolloutConfig

# Settings that may change when an evaluation is continued.
FREE = ("out", "drawn", "fresh", "compare")
# Stands between the two folders of --compare, once they are one value. No path holds a line break.
BETWEEN_FOLDERS = "\n"
# Choices of flags. appendix/prediction_files.py, agent_answers.py and predictions.py explain them.
FORMS = ("id", "dict", "order", "question", "screenspot-pro", "vlm-r1")
ANSWERS = ("plain", "pyautogui", "tool-call", "bare", "point-tag")
UNITS = ("source", "fed", "0-1000", "0-100", "0-1")
# Added to a prediction that holds no answer: no other part of it may be read as one.
NO_ANSWER = "\n<answer>  </answer>"
# Seconds of drawing after which --drawn 0 is suggested.
LONG_DRAWING = 10


def check_flags(cfg):
    """Raise DataError for a flag, or a pair of flags, that makes no sense."""
    if min(cfg.batch, cfg.max_new_tokens, cfg.samples) < 1:
        raise DataError("--batch, --max-new-tokens and --samples must be at least 1")
    if cfg.samples > 1 and (cfg.circular or cfg.predictions or cfg.temperature == 0):
        raise DataError("--samples samples each question again; it needs a --temperature above 0, "
                        "such as 1, and goes with neither --circular nor --predictions")
    if cfg.circular and cfg.predictions:
        raise DataError("--circular asks a model again; --predictions are answers to the options "
                        "in their published order")
    if cfg.compare:
        folders = cfg.compare.split(BETWEEN_FOLDERS)
        if len(set(map(os.path.realpath, folders))) != 2:
            raise DataError("--compare needs two different folders, as in --compare runs/a runs/b; "
                            "each is the --out of a run")
    elif not cfg.predictions:
        for flag, value in (("--form", cfg.form), ("--answers", cfg.answers)):
            if value not in ("id", "plain"):            # their defaults
                raise DataError(f"{flag} {value} is about a file of --predictions; name the file")


def join_folders(argv):
    """The command line with the two values of --compare made one, because a flag takes one."""
    argv = list(argv)
    if "--compare" in argv:
        i = argv.index("--compare")
        folders = [value for value in argv[i + 1:i + 3] if not value.startswith("--")]
        argv[i + 1:i + 1 + len(folders)] = [BETWEEN_FOLDERS.join(folders)]
    return argv


@contextlib.contextmanager
def said_on_error(saved):
    """Add to a message about bad input, such as an image that vanished, what is kept anyway."""
    try:
        yield
    except DataError as e:
        raise DataError(f"{e}. {saved}") from None


# --------------------------------------------------------------------------------------------------
# the questions

def load_samples(cfg):
    """The questions that the flags ask for -> (samples, a title that says what they are)."""
    if cfg.data:
        title = cfg.data
        samples = data.read_jsonl(cfg.data, cfg.images or None)[:cfg.n or None]
    else:
        title = f"toy {cfg.task}, {cfg.difficulty}"
        side = weights.toy_side(*weights.find_model(cfg.checkpoint or cfg.model))
        samples = data.toy(cfg.task, "test", cfg.n or 200, cfg.seed, cfg.difficulty, side)
    # Toy options are shuffled already, and predictions answer the options as published.
    shuffle = cfg.shuffle and cfg.data and not cfg.predictions
    if cfg.circular or shuffle:
        samples = arrange(samples, cfg.seed, cfg.circular)
    if cfg.samples > 1:
        samples = repeat(samples, cfg.samples)
    return samples, title


def repeat(samples, n):
    """Every sample n times. meta["sample_of"] is the id of the original."""
    repeated = []
    for s in samples:
        for k in range(n):
            repeated.append(replace(s, id=f"{s.id}#{k}", meta=s.meta | {"sample_of": s.id}))
    return repeated


def arrange(samples, seed, circular=False):
    """Multiple-choice samples get their options in another order; the others stay as they are.

    The order is random and depends on the seed and the id of the sample. With circular a sample
    becomes one sample per rotation of its options, and meta["of"] is the id of the original.
    meta["order"][k] is the published index of the option that is shown in place k.
    """
    arranged = []
    for s in samples:
        n = len(s.options)
        if s.answer_type != "choice":
            arranged.append(s)
        elif circular:
            for r in range(n):
                rotated = with_order(s, [*range(r, n), *range(r)])
                meta = rotated.meta | {"of": s.id}
                arranged.append(replace(rotated, id=f"{s.id}@{r}", meta=meta))
        else:
            order = random.Random(f"{seed}/{s.id}").sample(range(n), n)
            arranged.append(with_order(s, order))
    return arranged


def with_order(s, order):
    """The sample with its options in this order."""
    options = [s.options[k] for k in order]
    answer = None if s.answer is None else order.index(s.answer)
    return replace(s, options=options, answer=answer, meta=s.meta | {"order": order})


def style_of(cfg, samples):
    """The prompt style: that of --style, else the one that fits the questions."""
    if cfg.style:
        return cfg.style
    if not cfg.data:
        return data.PROMPT_STYLES[data.TASK_RECIPES[cfg.task]]
    # A box may lie in any image, but the zoom tool only cuts from the first image.
    only_boxes = all(s.answer_type == "box" for s in samples)
    return "boxes" if only_boxes else "zoom"


# --------------------------------------------------------------------------------------------------
# memory

KNOBS = ("a smaller --batch (it changes the random numbers), --max-pixels, --max-zooms, "
         "--max-new-tokens")


def print_memory(vlm, cfg, samples, sizes):
    """Print how much memory a released model will need at the worst moment, and if it is too much.

    sizes: those of the samples' images, see memory.longest_prompt.
    """
    if is_tiny(cfg.checkpoint or cfg.model):
        return
    prompt_tokens = memory.longest_prompt(vlm, samples, cfg.style, sizes)
    plan = memory.memory_plan(vlm, memory_options(vlm, cfg, prompt_tokens))
    parts = [f"{part} {plan[part] / 1e9:.1f}" for part in memory.PARTS if plan[part]]
    print(f"memory: {plan['peak'] / 1e9:.1f} GB at most ({', '.join(parts)}); the longest prompt "
          f"has {prompt_tokens} tokens")
    memory.warn_if_too_large(plan, vlm.device, KNOBS)


def memory_options(vlm, cfg, prompt_tokens):
    """-> memory.MemoryOptions of an evaluation. prompt_tokens: of the longest prompt."""
    config = run.pick_fields(cfg, RolloutConfig)
    return memory.rollout_options(vlm, config, cfg.batch, prompt_tokens)


# --------------------------------------------------------------------------------------------------
# the rows

class EpisodeFile:
    """episodes.jsonl in --out: a row per episode, written batch by batch, by all ranks.

    If the folder holds rows of the same settings, an evaluation continues from them. If settings
    differ, or an input file has changed since, the program ends with an error. Only rows that were
    scored from --predictions are overwritten then, since they take seconds to make.
    """

    def __init__(self, cfg):
        self.cfg = cfg
        self.path = os.path.join(cfg.out, "episodes.jsonl")
        self.config_path = os.path.join(cfg.out, "config.json")
        self.settings = settings_of(cfg)
        self.rows = {}                                  # label of a run: {id: row}
        if ranks.rank() == 0:
            self.rows = self.read()
            run.write_json(self.config_path, self.settings)
            self.write()                                # leaves out a last row that was cut off
        ranks.barrier()                                 # the others read what rank 0 has written
        if ranks.rank() > 0:
            self.rows = self.read()
        ranks.barrier()                                 # no rank adds a row before all have read

    def read(self):
        """The rows in the folder, {label: {id: row}}. Raises DataError if the settings differ."""
        rows = {}
        if self.cfg.fresh or not self.holds_rows():
            return rows
        before = run.read_json(self.config_path)
        differences = []
        for key in dict.fromkeys([*self.settings, *before]):
            there = before.get(key)
            here = self.settings.get(key)
            if there != here:
                differences.append(f"{key} ({there!r} there, {here!r} here)")
        if differences and before.get("predictions"):   # cheap to make again: start empty
            return rows
        if differences:
            raise DataError(f"{self.cfg.out} holds a run with other settings: "
                            f"{', '.join(differences[:3])}; name another --out, or overwrite it "
                            "with --fresh")
        with open(self.path, encoding="utf-8", errors="replace") as f:
            for n, line in enumerate(f, 1):
                if line.endswith("\n"):                 # a kill may have cut off the last line
                    row = read_row(line, f"{self.path}, line {n}")
                    rows.setdefault(row["run"], {})[row["id"]] = row
        return rows

    def holds_rows(self):
        if not os.path.exists(self.config_path) or not os.path.exists(self.path):
            return False
        return os.path.getsize(self.path) > 0

    def write(self):
        """Replace the content of the file by self.rows."""
        lines = []
        for rows in self.rows.values():
            lines += [json.dumps(row) + "\n" for row in rows.values()]
        run.write_text(self.path, "".join(lines))

    def missing(self, label, samples):
        """The indices of the samples that have no row in this run yet."""
        done = self.rows.get(label, {})
        numbers = [i for i, s in enumerate(samples) if s.id not in done]
        if done:
            print(f"{label}: {len(done)} episodes are in {self.cfg.out} already, "
                  f"{len(numbers)} are left")
        return numbers

    def add(self, label, episodes):
        """Append rows to the file in a single write, because other ranks append to it too."""
        content = lines_of(label, episodes).encode()
        try:
            with open(self.path, "ab", buffering=0) as f:
                while content:                          # a disk that is almost full takes a part
                    content = content[f.write(content):]
        except OSError as e:
            raise OSError(e.errno, e.strerror, self.path) from None

    def overwrite(self, label, episodes):
        """Replace the file by the rows of these episodes."""
        run.write_text(self.path, lines_of(label, episodes))

    def collect(self, label, episodes, samples):
        """This rank's new episodes -> the episodes of all samples, other ranks' and saved ones too.

        All are restored from their rows, so they have no tokens.
        """
        rows = self.rows.setdefault(label, {})
        for row in ranks.gather([record(e) for e in episodes]):
            rows[row["id"]] = row
        return [restore(rows[s.id], s) for s in samples]


def lines_of(label, episodes):
    return "".join(json.dumps({"run": label, **record(e)}) + "\n" for e in episodes)


def read_row(line, where):
    """A line of episodes.jsonl -> its row."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        row = json.loads(line)
        if isinstance(row["run"], str) and isinstance(row["id"], str):
            return row
    raise DataError(f"{where} is {line.strip()!r:.60}; expected the row of an episode. Remove that "
                    "line to go on, or overwrite all with --fresh")


def settings_of(cfg):
    """The settings that decide the content of the rows -> {name: value}.

    The size and time of each file they name are added, so that a changed file is noticed.
    """
    settings = {k: v for k, v in asdict(cfg).items() if k not in FREE}
    for name in ("data", "predictions", "checkpoint", "model"):
        path = settings[name]
        if name in ("checkpoint", "model"):
            path = os.path.join(path, "model.safetensors")
        if settings[name] and os.path.isfile(path):
            settings[f"the file of --{name}"] = [os.path.getsize(path), os.path.getmtime(path)]
    return settings


def shared_verdicts(a, b):
    """The folders of two runs -> {id: right or not} for each, over the questions that both have."""
    rows_a = read_verdicts(a)
    rows_b = read_verdicts(b)
    hits_a = {}
    hits_b = {}
    for i in rows_a:
        if i not in rows_b:
            continue
        asked_a = rows_a[i]["question"]
        asked_b = rows_b[i]["question"]
        if asked_a != asked_b:
            raise DataError(f"id {i!r} asks {asked_a!r:.60} in {a}, {asked_b!r:.60} in {b}: "
                            "not the same data")
        hits_a[i] = rows_a[i]["verdict"] == "right"
        hits_b[i] = rows_b[i]["verdict"] == "right"
    if not hits_a:
        raise DataError(f"{a} and {b} share no question that both have been scored on")
    for folder, rows in ((a, rows_a), (b, rows_b)):
        if len(rows) > len(hits_a):
            print(f"{folder}: {len(rows) - len(hits_a)} questions that the other lacks are left "
                  "out")
    return hits_a, hits_b


def read_verdicts(folder):
    """The scored rows of the first run in a folder, {id: row}.

    After --zoom all the first run is the one in which zooms are allowed.
    """
    scored = {}
    first = None                                        # label of the first run
    for where, row in files.read_rows(os.path.join(folder, "episodes.jsonl")):
        for key in ("run", "id", "verdict", "question"):
            files.need(row, key, str, where)
        first = first or row["run"]
        if row["run"] == first and row["verdict"]:
            scored[row["id"]] = row
    return scored


# --------------------------------------------------------------------------------------------------
# the table, on the screen and on the page

def show(cfg, title, runs, summary, summaries):
    """Print the table; write the page, except with --plain. See evaluate.summarise_runs."""
    title = heading(title, summary, summaries)
    rows = table_rows(summaries)
    print_table(title, rows)
    for label, episodes in runs.items():
        print_unreadable(cfg, label, episodes)
    page = ""
    if not cfg.plain:
        with suggestion_if_long():
            write_page(cfg, title, runs, rows, summary)
        page = "report.html, "
    print(f"\n-> {cfg.out}/{page}summary.json, episodes.jsonl")


def heading(title, summary, summaries):
    """The title with the numbers that have no column in the table: chance, zoom gain, averages."""
    if "chance" in summary:
        title += f"; chance {summary['chance']:.1%}"
    if "zoom_gain" in summary:
        title += (f"; zoom gain {summary['zoom_gain']:.1%}, zoom harm {summary['zoom_harm']:.1%} "
                  "(right only with it, right only without)")
    for label, s in summaries.items():
        if "average" in s:
            title += (f"; {label}: the average of {s['benchmark']} is {s['average']:.1%} "
                      f"(mean of {s['average_of']})")
        if "pass_at" in s:
            shares = ", ".join(f"pass@{k} {share:.1%}" for k, share in s["pass_at"].items())
            title += f"; {label}: {shares}"
    return title


def table_rows(summaries):
    """[(label, numbers)]: each run, then its categories, unless a category is the whole run."""
    rows = []
    for label, s in summaries.items():
        rows.append((label, s))
        for name, part in s["categories"].items():
            if part["n"] < s["n"]:
                rows.append((f"  {name}", part))
    return rows


def print_table(title, rows):
    width = max(len(label) for label, _ in rows)
    print(f"\n{title}\n{'':{width}}  {'n':>6}  {'correct':>7}  {'accuracy':>8}  "
          f"{'95 % interval':>16}  wrong format")
    for label, s in rows:
        print(f"{label:{width}}  {s['n']:6}  {s['correct']:7}  {s['accuracy']:8.1%}  "
              f"{s['low']:6.1%} to {s['high']:6.1%}  {s['wrong_format']:12}")


def print_unreadable(cfg, label, episodes):
    """Say that many answers cannot be read, a tenth or more, and show the end of one of them.

    If they are most of the answers, three are shown.
    """
    answered = [e for e in episodes if e.finish_reason != "no prediction"]
    wrong = [e.text for e in answered if e.reward_components["wrong_format"]]
    if not wrong or 10 * len(wrong) < len(answered):
        return
    most = 2 * len(wrong) > len(answered)
    print(f"\n{label}: {len(wrong)} of {len(answered)} answers cannot be read (wrong format):")
    for text in wrong[:3 if most else 1]:
        print("  " + end_of(text.removesuffix(NO_ANSWER)))
    if most and cfg.predictions:
        print(f"their points are read as --answers {cfg.answers}; known: {', '.join(ANSWERS)}")


def end_of(text, length=90):
    """The end of a text, where its answer should be, on one line of printable characters."""
    shown = " ".join(text[-2 * length:].split())
    if len(shown) > length or len(text) > 2 * length:
        shown = "... " + shown[-length:]
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown) or "(no text)"


def print_comparison(found, interval_a, interval_b):
    """Print what evaluate.paired found, with the folders "a" and "b" and their accuracies."""
    a = found["a"]
    b = found["b"]
    n = found["n"]
    for folder, only, (low, high) in ((a, "only_a", interval_a), (b, "only_b", interval_b)):
        correct = found["both"] + found[only]
        print(f"{folder}: {correct} of {n} right, {correct / n:.1%} ({low:.1%} to {high:.1%})")
    print(f"right only in {a}: {found['only_a']}; only in {b}: {found['only_b']}; "
          f"in both: {found['both']}; in neither: {found['neither']}")
    print(f"difference {found['difference']:+.1%} (95 % interval {found['low']:+.1%} to "
          f"{found['high']:+.1%}), McNemar's exact p = {found['p']:.2g}")


@contextlib.contextmanager
def suggestion_if_long():
    """Name --drawn 0 to a person who waits for the pictures of the page."""
    said = "drawing takes long: the same command with --drawn 0 draws no episode"
    hint = threading.Timer(LONG_DRAWING, print, [said])
    hint.daemon = True
    hint.start()
    try:
        yield
    finally:
        hint.cancel()


def write_page(cfg, title, runs, rows, summary):
    """report.html in --out: the table, the settings, and the episodes of each run.

    summary: the content of summary.json.
    """
    from appendix import metrics, report
    settings = {"on": title}                            # the page begins: on TITLE
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        if value != f.default and f.name not in ("data", "out", "fresh"):
            settings[f.name] = value
    measured = cfg.predictions or cfg.checkpoint or cfg.model
    notes = {"predictions": "Answers that were read from a file: no model was run here."}
    if cfg.style == "zoom":                             # no other style has a zoom tool
        notes |= metrics.control_notes()
    page = report.Report(
        title=f"How well does {measured} look?", sections=list(runs.items()),
        table=page_table(rows), settings=settings, drawn=cfg.drawn,
        run=os.path.basename(os.path.abspath(cfg.out)), num_questions=summary["n"],
        chance=summary.get("chance", 0.0), notes=notes, meanings=column_meanings())
    report.write_report(os.path.join(cfg.out, "report.html"), page)


def page_table(rows):
    """The table of report.Report: `table_rows` with a column for each mean that some row has."""
    from appendix import analysis
    means = []
    for name in ("mean_iou", "zooms", "saw", *analysis.COUNTS, "pointing"):
        if any(name in s for _, s in rows):
            means.append(name)
    head = [column_head(name) for name in ("accuracy", "n", "wrong_format", *means)]
    table = [("", head)]
    for label, s in rows:
        cells = [s, s["n"], s["wrong_format"]]          # the report draws s as its accuracy
        cells += [f"{s[name]:.2f}" if name in s else "" for name in means]
        table.append((label, cells))
    return table


def column_head(name):
    """The head of the column that shows a number of summary.json."""
    heads = {"accuracy": "accuracy, 95 % interval", "n": "questions"}
    return heads.get(name, name.replace("_", " "))


def column_meanings():
    """{head of a column: what its numbers mean}"""
    from appendix import metrics
    return {column_head(name): meaning for name, meaning in metrics.SUMMARY_GLOSSARY.items()}
