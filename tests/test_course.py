"""
The course's texts against the code: equations name functions that exist and that name the equation, the table of symptoms names
flags and metrics that exist.
"""
import ast, importlib, os, re

import pytest

from appendix import exercises
from conftest import ROOT

def rows(name):
    """The cells of the table of a Markdown file of the appendix."""
    with open(os.path.join(ROOT, "appendix", name), encoding="utf-8") as f:
        lines = [line.strip() for line in f if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]

def text_of(name):
    """The docstring of "module.function"; of a table in capitals, its source with comments."""
    module, _, function = name.rpartition(".")
    source = exercises.read(os.path.join(ROOT, exercises.source_path(module)))
    if function.isupper():
        first, last = exercises.span_of_definition(source, function)
        return "\n".join(source.split("\n")[first - 1:last])
    return ast.get_docstring(exercises.find_function(source, function)) + ast.get_docstring(ast.parse(source))

@pytest.mark.parametrize("paper, equation, what, function", rows("equations.md"), ids=lambda cell: cell.strip("`")[:30])
def test_equations_lead_to_functions(paper, equation, what, function):
    """Claim: the function exists, its docstring (or its file's) names the paper, and the equation by number."""
    name = function.strip("`")
    text = " ".join(text_of(name).split())
    assert hasattr(importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2])
    paper_name, _, number = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", paper).rpartition(", ")
    assert number in text or re.search(rf"\b{re.escape(paper_name)}\b", text), f"{name} does not name {paper}"
    if re.match(r"eq\.|p\.|figure", equation):
        assert equation in text, f"{name} does not name {equation}"
