"""Two tools for traces: print them, and draw the toy questions again that a file of them is about."""
import re

import data
from appendix.files import DataError


def show_traces(traces):
    """Print traces; the points of a trace are numbered in the order in which it names them."""
    for trace in traces:
        sample = trace.sample
        right = sample.answer or sample.targets
        if sample.options and sample.answer is not None:
            right = sample.options[sample.answer]
        print(f"\n{sample.id}  {trace.kind}")
        print(f"{sample.question}  {' / '.join(sample.options)}   (right: {right})")
        numbers = {}                                    # "x,y": its number
        for turn in trace.turns:
            text = re.sub(r"[(\[](-?\d+, ?-?\d+)[)\]]", lambda m: with_number(m, numbers), turn)
            print("  " + text.replace("\n", "\n  "))


def with_number(match, numbers):
    """A point of the text and its number, a new one if the point is new."""
    number = numbers.setdefault(match[1].replace(" ", ""), len(numbers) + 1)
    return f"{match[0]}[{number}]"


def draw_again(rows, difficulty, side):
    """Rows of a trace file, [(where, row)] -> the toy questions that they are about, list[Sample].

    An id is task/split/seed/number, and that, the difficulty and the side are all there is to a
    toy question. Raises DataError for other ids.
    """
    wanted = {}                                         # {task/split/seed: questions to draw}
    for where, row in rows:
        if not isinstance(row, dict):                   # refused later, as a row without turns
            continue
        name = row.get("id")
        stream, _, number = str(name).rpartition("/")
        is_toy = stream.split("/")[0] in data.TASKS and stream.count("/") >= 2
        if not is_toy or not number.isdigit():
            raise DataError(f"{where}id {name!r} is no question of the toy world; traces about the "
                            "rows of a file need that file: --data FILE.jsonl")
        wanted[stream] = max(int(number) + 1, wanted.get(stream, 0))
    samples = []
    for stream, n in wanted.items():
        task, split, seed = stream.split("/", 2)
        samples += data.toy(task, split, n, seed, difficulty, side)
    return samples
