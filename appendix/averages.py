"""How published benchmarks average: over questions, over cells, over rotations of a question.

A cell is a group of questions with the same category. The categories of a question are a list of
levels, coarse to fine: ["mobile", "icon"]. A row is a dict about one episode, made by
evaluate.summary_rows.
"""
from collections import Counter

from appendix.episode_rows import is_right

# Benchmarks that average over cells: (number of levels that define a cell, number of cells in the
# published benchmark, or 0 if that depends on the file). All others average over the questions:
# with 0 levels all questions are in one cell.
CELLS = {
    "blink": (1, 14),
    "mig_bench": (1, 10),
    "mig_bench_revised": (1, 10),
    "robospatial": (1, 3),
    "screenspot": (2, 6),
    "refcoco": (1, 0),
}


def chance(samples):
    """The accuracy that is possible without looking at the image.

    Either every question is guessed (one over its number of options, 0 without options), or every
    answer is the text that is right most often. The higher accuracy of the two.
    """
    guesses = [1 / len(s.options) if s.options else 0.0 for s in samples]
    known = [s for s in samples if s.options and s.answer is not None]
    right = Counter(s.options[s.answer].casefold() for s in known)
    most_frequent = max(right.values(), default=0)
    return max(sum(guesses), most_frequent) / max(len(samples), 1)


def benchmark_of(rows):
    """The benchmark that all rows belong to; "" if there is none, or more than one."""
    names = set()
    for r in rows:
        # "blink_parquet" is the benchmark "blink", read from a parquet file.
        names.add(str(r.get("benchmark") or "").removesuffix("_parquet"))
    return names.pop() if len(names) == 1 else ""


def categories_of(row, benchmark):
    """The labels that a row is counted under: each level of its category, and its cell."""
    levels, _ = CELLS.get(benchmark, (0, 1))
    labels = list(row["category"])
    if levels > 1:                                      # else the cell is a level itself
        labels.append(", ".join(row["category"][:levels]))
    return list(dict.fromkeys(labels))                  # each label once, in order


def benchmark_average(rows):
    """The average as the benchmark defines it -> {"benchmark", "average", "average_of"}.

    average: the mean over cells of the accuracy within a cell, or the mean over all questions.
    average_of: which of the two, in words. {} if the rows do not belong to one benchmark.
    """
    benchmark = benchmark_of(rows)
    if not benchmark:
        return {}
    levels, expected = CELLS.get(benchmark, (0, 1))
    cells = {}                                          # cell: [right or not]
    for r in rows:
        if not r.get("hidden"):
            cell = tuple(r["category"][:levels])
            cells.setdefault(cell, []).append(is_right(r, benchmark))
    means = [sum(hits) / len(hits) for hits in cells.values()]
    average = sum(means) / len(means) if means else 0.0
    if levels == 0:
        average_of = "all questions"
    elif expected == 0:
        average_of = f"{len(cells)} cells"
    else:
        average_of = f"{len(cells)} of {expected} cells"
    return {"benchmark": benchmark, "average": average, "average_of": average_of}


def all_rotations(rows):
    """With --circular -> {"all_rotations": share of questions that are right in every rotation}.

    {} if no question has rotations.
    """
    questions = {}                                      # id of the question: [right or not]
    for r in rows:
        if "of" in r and not r.get("hidden"):
            questions.setdefault(r["of"], []).append(is_right(r))
    if not questions:
        return {}
    right = sum(all(hits) for hits in questions.values())
    return {"all_rotations": right / len(questions)}
