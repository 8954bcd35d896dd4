"""The rewards: parse an answer, score it. Strings and numbers in, floats out; no model, no files.

    transcript   <think> the sign at (412, 80) ... </think> <answer> (415, 83) </answer>
        parse_answer   the answer as a value: (415.0, 83.0), or None
        judge          is it right?            accuracy A (a box also has its iou)
        a recipe       is it well formed?      format F and other parts; all parts together give
                                               the reward

    recipe              reward                         from
    vigorl              0.5 A + 0.5 F C                ViGoRL (2505.23678), single turn; `grounded`
    vigorl-ungrounded   0.5 A + 0.5 F                  its baseline without points
    vigorl-zoom         0.6 A + 0.4 F (1 + distinct)   ViGoRL, multi-turn; see `distinct_bonus`
    univg-r1            IoU + F                        UniVG-R1 (2505.14231)
    accuracy            A                              evaluation

Coordinates: an answer is in the model's own convention, a target in source pixels of its image.
`frames` converts one to the other. It has one (sx, sy, width, height) per prompt image:
(x * sx, y * sy) is the source pixel; width and height are those of the source image. With
frames=None, answers are in source pixels already, and the size of the images is unknown.

Left out: UniVG-R1's mode without tags, for simple single images. Its IoU takes 1 off x2 and y2
and adds it back to the sides of the overlap, which only sets overlaps of one unit or less to 0. IoU
here is the plain continuous one.

A policy in training may write any text, so every search below takes time linear in its length.
"""
import copy
import math
import re
from dataclasses import dataclass

EPS = 1e-6          # tolerance at edges and thresholds, because the scales in `frames` are rounded


# --------------------------------------------------------------------------------------------------
# parse: from a transcript to a value

NUMBER = r"\s*([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))\s*"
TWO = f"{NUMBER},{NUMBER}"
# (x, y)   [x, y]   (x1, y1, x2, y2)   [x1, y1, x2, y2]   (x1, y1),(x2, y2)
SHAPE = re.compile(rf"[(\[]{TWO}(?:[)\]]\s*,\s*[(\[]{TWO}|,{TWO})?[)\]]")
# The same after a JSON key or a model's own mark, which says what it is.
MARKED = re.compile(r'(?:"(?:point|bbox)_2d"\s*:|<\|box_start\|>)\s*' + SHAPE.pattern)
# Where a point is asked: one bracket, or a list of brackets, of which the first counts.
UNNAMED = NUMBER.replace("([", "(?:[")                  # a number that is not a group of the match
POINTS = re.compile(rf"[(\[]{TWO}(?:,{TWO})?[)\]](?:\s*,\s*[(\[]{UNNAMED}(?:,{UNNAMED})*[)\]])*")
# A label may hold numbers and tags. It is no answer.
LABEL = re.compile(r'"label"\s*:\s*"[^"\n]*"')


def parse_answer(text, answer_type):
    """The value that a transcript gives as its answer; None if there is none.

    -> (x, y) for "point", (x1, y1, x2, y2) for "box", a stripped str for "choice" and "text".
    If a point is asked for and a box is given, its center is the answer. A box is four numbers in
    one bracket, or what a key or a mark calls a box. Of several points the first is the answer.
    Decimals, leading zeros and line breaks are read, too (not by the originals).
    """
    if answer_type in ("choice", "text"):
        said, _ = answer_part(text)
        return said.strip() or None
    said, tagged = answer_part(LABEL.sub("", text))
    shape = find_shape(said, answer_type, take_first=tagged)
    if shape is None:
        return None
    values = tuple(float(number) for number in shape.groups() if number)
    if answer_type == "point" and len(values) == 4:
        x1, y1, x2, y2 = values
        values = ((x1 + x2) / 2, (y1 + y2) / 2)
    if not all(map(math.isfinite, values)):             # float() reads 400 digits as inf
        return None
    return values


def answer_part(text):
    """-> (the part of the text that holds the answer, whether it stood in a tag).

    This is the content of the last <answer>...</answer> (the originals: of the first). Without such
    a tag it is the text after the last thought or tool call, never text inside one: a point in a
    thought is no answer.
    """
    last_end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(0, last_end))         # -1 if there is no such tag
    if start >= 0:
        start += len("<answer>")
        return text[start:text.index("</answer>", start)], True
    said = re.split(r"</(?:think|tool_call)>", text)[-1]
    said = re.split(r"<(?:think|tool_call)>", said)[0]          # drop a thought that never closes
    return re.sub(r"</?answer>", "", said), False


def find_shape(said, answer_type, take_first):
    """The match of a point or box in the text, or None; for "box" it must have four numbers.

    A marked one comes before a loose one. take_first: the first match. Otherwise the last, because
    free text ends with its conclusion.
    """
    loose = POINTS if answer_type == "point" else SHAPE
    for pattern in (MARKED, loose):
        found = None
        for shape in pattern.finditer(said):
            has_four_numbers = shape.lastindex > 2      # groups 3-4 or 5-6 hold the second corner
            if answer_type == "point" or has_four_numbers:
                found = shape
                if take_first:
                    break
        if found:
            return found
    return None


# --------------------------------------------------------------------------------------------------
# judge: is the value right? A grader takes (value, sample, frames) and returns a float in [0, 1].

def to_source(values, image, frames):
    """(x, y) or (x1, y1, x2, y2) as the model says it -> source pixels of prompt image `image`."""
    sx, sy = frames[image][:2] if frames else (1, 1)
    scales = (sx, sy, sx, sy)
    return [value * scale for value, scale in zip(values, scales)]


def inside(point, frames):
    """Does the point lie in any of these images, edges included?

    With frames=None the size of the images is unknown: only negative coordinates lie outside.
    """
    x, y = point
    for sx, sy, width, height in frames or [(1, 1, 1e9, 1e9)]:
        in_width = -EPS <= x * sx <= width + EPS
        in_height = -EPS <= y * sy <= height + EPS
        if in_width and in_height:
            return True
    return False


def area(box):
    """Area of (x1, y1, x2, y2); 0 if it is inverted."""
    x1, y1, x2, y2 = box
    return max(0.0, x2 - x1) * max(0.0, y2 - y1)


def iou(a, b):
    """Plain continuous intersection over union of two boxes (x1, y1, x2, y2).

    0 if either box is inverted or has no area. Nothing is clamped to the image.
    """
    area_a = area(a)
    area_b = area(b)
    if not (area_a > 0 and area_b > 0):
        return 0.0
    left = max(a[0], b[0])
    top = max(a[1], b[1])
    right = min(a[2], b[2])
    bottom = min(a[3], b[3])
    overlap = area((left, top, right, bottom))
    return overlap / (area_a + area_b - overlap)


def in_polygon(x, y, corners):
    """Is (x, y) inside: does a ray from it to the right cross an odd number of edges?"""
    crossings = 0
    for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1]):
        if (y1 > y) != (y2 > y):
            x_of_edge = x1 + (y - y1) / (y2 - y1) * (x2 - x1)
            crossings += x < x_of_edge
    return crossings % 2 == 1


def point_in_target(point, sample, frames):
    """1 if the point is in the image, the box (edges included) and the polygon of any target."""
    for target in sample.targets:
        x, y = to_source(point, target["image"], frames)
        x1, y1, x2, y2 = target["box"]
        in_box = x1 - EPS <= x <= x2 + EPS and y1 - EPS <= y <= y2 + EPS
        if not in_box:
            continue
        if "polygon" in target and not in_polygon(x, y, target["polygon"]):
            continue
        frame = [frames[target["image"]]] if frames else None
        if inside(point, frame):
            return 1.0
    return 0.0


def best_iou(box, sample, frames):
    """The largest IoU with any target."""
    ious = []
    for target in sample.targets:
        in_source = to_source(box, target["image"], frames)
        ious.append(iou(in_source, target["box"]))
    return max(ious)


def named_image(text):
    """'<answer> image 2: (1, 2),(3, 4)' -> 1, counted from 0; None if it names no image."""
    answer = text.rpartition("<answer>")[2]             # the whole text if there is no tag
    named = re.search(r"\bimage\s{0,9}([0-9]{1,9})", answer, re.IGNORECASE)
    return int(named[1]) - 1 if named else None


def plain(text):
    """The form in which texts are compared: case folded, single spaces, no final period."""
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


ALPHABET = "abcdefghijklmnopqrstuvwxyz"
NOISE = re.compile(r"[*`]|</?s>|<\|(?:im_end|endoftext|eot_id)\|>")        # emphasis, end tokens
OPENING = re.compile(r"(?:the )?(?:(?:final|correct|right) )?(?:answer|option)\b(?: is)?\s*:?\s*")
FIRST_LETTER = re.compile(r"\(?([a-z])(?:[.):]\s*(.*))?")
LETTER = re.compile(r"\(([A-Za-z])\)|\b(?:[Oo]ption|[Aa]nswer)(?: is)?\s*:?\s+([A-Z])\b(?!')")
YES_OR_NO = re.compile(r"(?:^|[.!?] )(yes|no)(?=[,.;:!]|$)")


def named_option(said, options):
    """The index of the option that a text names; None if it names none, or more than one.

    A text that equals an option is that option, even if it looks like the letter of another one.
    "The answer is", "Answer:" or "Option" may stand before it. Otherwise an option is named by

        its letter at the start        'A', 'A.', 'A)', 'A:', '(A)', with or without its text
        its letter anywhere            in parentheses '(B)', or after a word: 'option B'
        yes or no, if it is an option  at the start of a sentence: 'Yes, it can fit there.'

    Emphasis (*, `) and end tokens (</s>, <|im_end|>) are ignored. ViGoRL's single turn drops any
    letter in front: there 'D. left' is the option 'left', even if that is A; here it names none.
    """
    said = NOISE.sub("", said)
    texts = [plain(NOISE.sub("", option)) for option in options]
    whole = plain(said)
    short = OPENING.sub("", whole, count=1) if OPENING.match(whole) else whole
    for text in (whole, short):
        if text in texts:
            return texts.index(text)
    letters = [before or after for before, after in LETTER.findall(said)]
    words = YES_OR_NO.findall(whole)
    first = FIRST_LETTER.fullmatch(short)
    if first:
        letters.append(first[1])
        words.append(first[2])
    named = {texts.index(word) for word in words if word in texts}
    named |= {ALPHABET.index(letter.lower()) for letter in letters}
    only = named.pop() if len(named) == 1 else None
    return only if only in range(len(options)) else None


def choice_match(option, sample, frames):
    """1 if the option of this index (None: no option) has the text of the right one."""
    if option is None:
        return 0.0
    return float(plain(sample.options[option]) == plain(sample.options[sample.answer]))


def text_match(said, sample, frames):
    """The best match with any accepted string; a web action may match in part."""
    is_web_action = sample.meta.get("matcher") == "web_action"
    match_one = web_action if is_web_action else same_words
    return max(match_one(said, gold) for gold in sample.answer)


def same_words(said, gold):
    return float(plain(said) == plain(gold))


def web_action(said, gold):
    """ViGoRL's web action reward: 0.5 for the action word and 0.5 for its arguments.

    An action is written 'type [12] [red shoes]'. The arguments share their 0.5 evenly. If the right
    action has no arguments, its word gives 1. The original does not compare the typed text, nor the
    answer of 'stop [answer]'; it takes 'type [12] [bus stop]' for a stop; a 'scroll' in the wrong
    direction gives 0 there and 0.5 here; and it gives 0 to 'hover', here an action like any other.
    """
    word, arguments = read_action(said)
    gold_word, gold_arguments = read_action(gold)
    same_word = float(word == gold_word)
    if not gold_arguments:
        return same_word
    same = sum(a == b for a, b in zip(arguments, gold_arguments))
    return 0.5 * same_word + 0.5 * same / len(gold_arguments)


def read_action(text):
    """'type [12] [red shoes]' -> ("type", ["12", "red shoes"])"""
    text = plain(text)
    word = re.match(r"\W*(\w*)", text)[1]
    arguments = re.findall(r"\[([^\[\]]*)\]", text)[:2]     # a third, "press enter", is ignored
    return word, [argument.strip() for argument in arguments]


GRADERS = {"point": point_in_target, "box": best_iou, "choice": choice_match, "text": text_match}


def judge(value, sample, frames):
    """Is a parsed answer right? -> {name: float}

    accuracy       1 if right, 0 if not; a box is right if its IoU is 0.5 or more (only the recipe
                   univg-r1 takes the IoU itself); a web action may be right in part
    wrong_format   1 if no answer could be parsed (value is None) or it names no option, else 0
    iou            IoU of a box; only for boxes
    hidden         1 if the benchmark does not publish the right answer, else absent; accuracy is 0
                   then, and means should leave the sample out
    """
    if sample.answer_type in ("point", "box"):
        hidden = not sample.targets
    else:
        hidden = sample.answer in (None, [])
    if sample.answer_type == "choice" and value is not None:
        value = named_option(value, sample.options)
    grade = 0.0
    if not hidden and value is not None:
        grade = GRADERS[sample.answer_type](value, sample, frames)
    found = {"accuracy": grade, "wrong_format": float(value is None)}
    if sample.answer_type == "box":
        found["accuracy"] = float(grade >= 0.5 - EPS)
        found["iou"] = grade
    if hidden:
        found["hidden"] = 1.0
    return found


# --------------------------------------------------------------------------------------------------
# form: is it well formed?

TAG = re.compile(r"(</?(?:think|answer|tool_call|observation)>)", re.IGNORECASE)
POINT = re.compile(rf"\({TWO}\)")
CORNERS = re.compile(rf"\({TWO}\)\s*,\s*\({TWO}\)")


def action_of(turn_text):
    """-> ("answer" or "tool_call", what is in it) if the turn is one thought and one action.

    Anything else, such as other text around them, gives (None, ""). White space around the turn is
    allowed (not in ViGoRL's single turn); its multi-turn also allows other text and <THINK>.
    """
    # Cut at every tag. A second, nested, unclosed or stray tag makes a list that fits no case.
    match TAG.split(turn_text.strip()):
        case ["", "<think>", _, "</think>", gap, "<answer>", body, "</answer>", ""]:
            action = "answer"
        case ["", "<think>", _, "</think>", gap, "<tool_call>", body, "</tool_call>", ""]:
            action = "tool_call"
        case _:
            return None, ""
    if gap.strip():
        return None, ""
    return action, body


def answers_well(turn_text, answer_type):
    """Is it one thought and one answer, written '(x, y)', '(x1, y1),(x2, y2)' or in any words?

    ViGoRL reads a point as Python would: only there '(1, 2,)' and '(0x1f, 2)' are well formed, only
    here '(1.5, 2)' and '(012, 2)'.
    """
    action, body = action_of(turn_text)
    body = body.strip()
    if action != "answer":
        return False
    if answer_type == "point":
        return POINT.fullmatch(body) is not None
    if answer_type == "box":
        return CORNERS.fullmatch(body) is not None
    return body != ""


def zooms_well(turn):
    """Is it one thought and one tool call, with a readable point in the image (so with a crop)?"""
    action, _ = action_of(turn.text)
    return action == "tool_call" and turn.crop is not None and turn.error is None


def episode_well_formed(turns, answer_type):
    """Does every turn zoom well, and the last one answer well?"""
    if not turns:
        return False
    return all(map(zooms_well, turns[:-1])) and answers_well(turns[-1].text, answer_type)


def grounded(turn_text, frames):
    """C: does the thought name at least one point (x, y), and are all of them in a prompt image?"""
    thought = turn_text.partition("<think>")[2].partition("</think>")[0]
    named = set(POINT.findall(thought))
    if not named:
        return False
    return all(inside((float(x), float(y)), frames) for x, y in named)


# --------------------------------------------------------------------------------------------------
# recipes: from what judge() found to the reward, with its named parts. `score` calls every recipe
# with the same keywords; **_ takes those that a recipe does not need.

@dataclass(frozen=True)
class Bonuses:
    """What vigorl-zoom pays in addition to A and F."""
    min_distance: float = 10.0  # least distance of distinct points, in the model's coordinates
    distinct: float = 0.0       # reward for each further distinct point (ViGoRL: 0.2)
    tool: float = 0.0           # reward for a right answer after a zoom that worked (DeepEyes: 1.2)


def vigorl(found, sample, text, frames, **_):
    """0.5 A + 0.5 F C

    The original gives C = 1 for any "(1, 2)". Here the points must be valid (paper, section 4.3),
    and "( 1, 2)", "(1.5, 2)" and "(-1, 2)" are points, too.
    """
    form = float(answers_well(text, sample.answer_type))
    ground = float(grounded(text, frames))
    reward = 0.5 * found["accuracy"] + 0.5 * form * ground
    return {"reward": reward, "format": form, "grounded": ground}


def vigorl_ungrounded(found, sample, text, **_):
    """0.5 A + 0.5 F

    The prompt is that of `vigorl`, which asks for points; a released model needs another one.
    """
    form = float(answers_well(text, sample.answer_type))
    return {"reward": 0.5 * found["accuracy"] + 0.5 * form, "format": form}


def vigorl_zoom(found, sample, turns, frames, max_zooms, bonuses, **_):
    """0.6 A + 0.4 F (1 + distinct)

    F: see `episode_well_formed`. distinct: see `distinct_bonus`; without it the policy of the paper
    no longer looks at a second place (accuracy on V* falls from 81.2 to 78.0).

    The original has no cap on distinct, so a wrong answer after 4 zooms (0.64) gets more than a
    right one with bad form (0.60). Here distinct is at most 0.4, so right always gets more:

                          F = 0    F = 1    F = 1, distinct = 0.4
        wrong (A = 0)     0.00     0.40     0.56
        right (A = 1)     0.60     1.00     1.16

    bonuses.tool is paid only where the answer is right AND a zoom worked. DeepEyes (2505.14362):
    1.2, with 0.8 A + 0.2 F. Their policy stopped zooming when wrong answers were paid too, and
    when there was no such bonus.
    """
    distinct = distinct_bonus(turns, max_zooms, bonuses)
    form = float(episode_well_formed(turns, sample.answer_type))
    reward = 0.6 * found["accuracy"] + 0.4 * form * (1 + distinct)
    if found["accuracy"] >= 1 and any(map(zooms_well, turns)):
        reward += bonuses.tool
    # Share of the turns whose thought is grounded; not part of the reward, for the log.
    ground = sum(grounded(turn.text, frames) for turn in turns) / max(1, len(turns))
    return {"reward": reward, "format": form, "distinct": distinct, "grounded": ground}


def distinct_bonus(turns, max_zooms, bonuses):
    """bonuses.distinct for each zoom, after the first, at a new place; 0.4 at most.

    A place is new if it is at least min_distance (Euclidean, in the model's convention) from every
    new place before it. Only zooms that worked count, and at most max_zooms of them.
    """
    kept = []
    for turn in turns:
        if zooms_well(turn):
            distances = [math.dist(turn.point, point) for point in kept]
            if min(distances, default=math.inf) >= bonuses.min_distance:
                kept.append(turn.point)
    further = max(0, min(len(kept), max_zooms) - 1)
    return min(0.4, bonuses.distinct * further)


def univg_r1(found, sample, text, **_):
    """IoU + F, in [0, 2]

    F: the text ends in a thought and an answer '(x1,y1),(x2,y2)' in whole numbers. As in the
    original, any text may stand before the thought. White space in and after the answer is allowed
    (not in the original). 'image 2:' must stand before the box if and only if meta "name_image".
    The IoU is that of any box that `parse_answer` reads: in brackets, in JSON, without a tag, with
    decimals. The original gives 0 to all of these.
    """
    before, _, answer = text.rpartition("<answer>")
    thought = "<think>" in before and before.rstrip().endswith("</think>")
    corner = r"\s*\(\s*[0-9]+\s*,\s*[0-9]+\s*\)\s*"
    image = r"\s*image [0-9]+:" if sample.meta.get("name_image") else ""
    boxed = re.fullmatch(rf"{image}{corner},{corner}</answer>\s*", answer)
    form = float(thought and boxed is not None)
    soft = found.get("iou", found["accuracy"])
    return {"reward": soft + form, "accuracy": soft, "format": form, "hit": found["accuracy"]}


def accuracy(found, **_):
    """A alone, for evaluation; format is 1 if the answer could be parsed."""
    return {"reward": found["accuracy"], "format": 1.0 - found["wrong_format"]}


RECIPES = {"vigorl": vigorl, "vigorl-ungrounded": vigorl_ungrounded, "vigorl-zoom": vigorl_zoom,
           "univg-r1": univg_r1, "accuracy": accuracy}


def score(sample, text, turns, recipe, frames=None, max_zooms=4, bonuses=Bonuses()):
    """Score one episode -> named floats.

    text is its transcript; turns are its assistant turns (.text .point .crop .error); recipe is a
    name in RECIPES. max_zooms: zooms that the episode allows.

    Always there: "reward", "accuracy", "format" and "wrong_format". Where they apply: "iou",
    "grounded", "distinct" and "hidden". Raises ValueError for an unknown recipe.
    """
    if recipe not in RECIPES:
        known = ", ".join(RECIPES)
        raise ValueError(f"unknown reward recipe {recipe!r}, expected one of: {known}")
    judged = copy.copy(sample)
    wrong_image = False
    if sample.targets and sample.meta.get("name_image"):
        image = named_image(text)
        targets = [target for target in sample.targets if target["image"] == image]
        wrong_image = not targets
        judged.targets = targets or sample.targets      # never empty: that would mean hidden
    found = judge(parse_answer(text, sample.answer_type), judged, frames)
    if wrong_image:                                     # the original does not check the image
        found["accuracy"] = 0.0
        found["iou"] = 0.0
    return found | RECIPES[recipe](
        found, sample=sample, text=text, turns=turns, frames=frames, max_zooms=max_zooms,
        bonuses=bonuses)
