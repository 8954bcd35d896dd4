"""The bugs that the other files plant: do their lines still stand where MUTATIONS says? Planting
each and running its test takes minutes (--slow); this looks only. Bug: a function was rewritten,
and the bug that proves its test can no longer be planted.
"""
import copy, functools, glob, importlib, os

import pytest

from conftest import ROOT, Planter, find_definition, tree_of

tree_of = functools.cache(tree_of)
FILES = [os.path.basename(path)[:-3]
         for path in sorted(glob.glob(os.path.join(ROOT, "tests", "test_*.py")))]

@pytest.mark.parametrize("file", FILES)
def test_every_bug_has_its_place(file):
    for target, old, new, *_ in getattr(importlib.import_module(file), "MUTATIONS", []):
        module, path = target.split(":")
        planter = Planter(old, new)
        planter.visit(copy.deepcopy(find_definition(tree_of(module), path)))    # the tree is shared
        assert planter.found == 1, (
            f"{old!r} stands in {target} {planter.found} times, expected once")

def test_the_bugs_are_many():
    assert sum(len(getattr(importlib.import_module(file), "MUTATIONS", [])) for file in FILES) > 300
