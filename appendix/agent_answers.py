"""How agents write a click -> the form that rewards.py reads.

    --answers    a text in this convention
    plain        (467, 109), [467, 109], {"point_2d": [467, 109]}, and what else rewards.py reads
    pyautogui    pyautogui.click(x=467, y=109), pyautogui.click(467, 109)
    tool-call    {"name": "computer_use", "arguments": {"action": "left_click",
                 "coordinate": [467, 109]}}
    bare         467, 109
    point-tag    <point>467 109</point>, <point x="46.7" y="10.9" alt="the cart">the cart</point>

A convention is named by the flag and never guessed. In a named one nothing else is an answer: a
tool call without a coordinate is unreadable, even if its thought names a point. Of several clicks
the first one counts, because an agent would do it first. The unit of the numbers is not told by
the convention, but by --convention: <point x= y=> often holds per cent (0-100).
"""
import re

import rewards
from appendix.evaluation_run import NO_ANSWER

# A number, as rewards.py reads it.
N = r"([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))"
CLICK = "(?:click|doubleClick|tripleClick|rightClick|middleClick|moveTo)"
TWO = rf"\s*{N}\s*,\s*{N}\s*"
PATTERNS = {
    "pyautogui": re.compile(
        rf"pyautogui\.{CLICK}\((?:\s*x\s*=)?\s*{N}\s*,(?:\s*y\s*=)?\s*{N}\s*[,)]"),
    "tool-call": re.compile(
        rf'(?:"coordinate"\s*:\s*"?|<parameter=coordinate>\s*)\[{TWO}(?:,{TWO})?\]'),
    "bare": re.compile(rf"{TWO}(?:,{TWO})?\.?\s*"),             # and nothing else
    "point-tag": re.compile(
        rf"<point>\s*{N}(?:\s*,\s*|\s+){N}\s*</point>"
        rf"""|<points?\s+x1?\s*=\s*["']{N}["']\s+y1?\s*=\s*["']{N}["']"""),
}


def as_plain(text, answers):
    """A text with the click that it holds added as <answer> (467, 109) </answer>, at its end.

    answers: a key of PATTERNS. A text that holds no click in this convention gets an empty answer,
    which cannot be read. Four numbers are a box.
    """
    if answers == "bare":
        said, _ = rewards.answer_part(text)
        click = PATTERNS[answers].fullmatch(said)
    else:
        click = PATTERNS[answers].search(without_thoughts(text))
    if click is None:
        return text + NO_ANSWER
    numbers = [number for number in click.groups() if number]
    return f"{text}\n<answer> ({', '.join(numbers)}) </answer>"


def without_thoughts(text):
    """What follows the last thought; not a thought that never closes."""
    said = text.rpartition("</think>")[2]
    return said.partition("<think>")[0]
