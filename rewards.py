"""
What is right: parse an answer, score it. Strings and numbers in, floats out; no model, no tensors, no files.

    transcript   <think> the sign at (412, 80) ... </think> <answer> (415, 83) </answer>
        parse_answer   the answer as a value: (415.0, 83.0), or None
        judge          is it right?            accuracy A (a box also carries its iou)
        a recipe       is it also well made?   format F and friends, and what the whole is worth: the reward

    recipe        reward                         from
    vigorl        0.5 A + 0.5 F C                ViGoRL (2505.23678), single turn; C: the thought is grounded in points
    vigorl-zoom   0.6 A + 0.4 F (1 + distinct)   ViGoRL, multi-turn; distinct: a bonus for looking at different places
    univg-r1      IoU + F                        UniVG-R1 (2505.14231)
    accuracy      A                              evaluation

Coordinates: an answer is in the model's own convention, a target in source pixels of its image. `frames` leads from one to
the other: one (sx, sy, width, height) per prompt image, (x * sx, y * sy) is the source pixel, width and height are the source
image's. frames=None: answers are in source pixels already, and the size of the images is unknown.

Left out: ViGoRL's ungrounded baselines (0.5 A + 0.5 F), UniVG-R1's tagless mode for simple single images, and the x2 - 1 ... + 1
in its IoU, which only drops overlaps thinner than one unit: IoU here is the plain continuous one. A policy in training writes
anything at all, so every search below takes time linear in the text.
"""
import copy
import math
import re

EPS = 1e-6  # a frame's scale is a rounded fraction: what lies on an edge or a threshold must still count as on it

# -----------------------------------------------------------------------------
# parse: what was said -> a value

NUMBER = r"\s*([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))\s*"
TWO = f"{NUMBER},{NUMBER}"
# (x, y)   [x, y]   (x1, y1, x2, y2)   [x1, y1, x2, y2]   (x1, y1),(x2, y2); the same inside JSON, fences and <|box_start|>
SHAPE = re.compile(rf"[(\[]{TWO}(?:[)\]]\s*,\s*[(\[]{TWO}|,{TWO})?[)\]]")
KEYED = re.compile(r'"(?:point|bbox)_2d"\s*:\s*' + SHAPE.pattern)  # looked for first: a "label" may hold numbers of its own

def parse_answer(text, answer_type):
    """
    -> (x, y) for "point", (x1, y1, x2, y2) for "box", a stripped str for "choice" and "text"; None if there is no answer.

    The answer is what stands in the LAST <answer>...</answer>. Without such a tag it is what was said after the last thought
    or tool call, and never inside one: a point that was only considered is no answer. A tag is read from its start, loose talk
    from its end, where the conclusion stands. A box where a point is asked counts by its center.
    """
    start = text.rfind("<answer>", 0, max(0, text.rfind("</answer>")))
    tagged = start >= 0
    if tagged:
        said = text[start + len("<answer>"):text.index("</answer>", start)]
    else:
        said = re.split(r"</(?:think|tool_call)>", text)[-1]
        said = re.split(r"<(?:think|tool_call)>", said)[0]  # begun and never closed
        said = re.sub(r"</?answer>", "", said)
    if answer_type in ("choice", "text"):
        return said.strip() or None

    for pattern in (KEYED, SHAPE):
        shape = None
        for shape in (m for m in pattern.finditer(said) if answer_type == "point" or m.lastindex > 2):
            if tagged:
                break
        if shape:
            values = tuple(float(number) for number in shape.groups() if number)  # int() would refuse 5000 digits
            if answer_type == "point" and len(values) == 4:
                values = ((values[0] + values[2]) / 2, (values[1] + values[3]) / 2)
            return values if all(map(math.isfinite, values)) else None
    return None

# -----------------------------------------------------------------------------
# judge: is the value right? Every grader takes (value, sample, frames) and returns a float in [0, 1].

def to_source(values, image, frames):
    """(x, y) or (x1, y1, x2, y2) in the model's convention -> source pixels of prompt image number `image`."""
    sx, sy = frames[image][:2] if frames else (1, 1)
    return [value * scale for value, scale in zip(values, (sx, sy, sx, sy))]

def inside(point, frames):
    """Does the point lie in any of these images, edges included? Of images of unknown size: is it not negative?"""
    x, y = point
    return any(-EPS <= x * sx <= w + EPS and -EPS <= y * sy <= h + EPS for sx, sy, w, h in frames or [(1, 1, 1e9, 1e9)])

def iou(a, b):
    """Plain continuous intersection over union of two (x1, y1, x2, y2); 0 if either is inverted or has no area. No clamp."""
    overlap = area_a = area_b = 1.0
    for low, high in ((0, 2), (1, 3)):
        area_a *= max(0.0, a[high] - a[low])
        area_b *= max(0.0, b[high] - b[low])
        overlap *= max(0.0, min(a[high], b[high]) - max(a[low], b[low]))
    return overlap / (area_a + area_b - overlap) if area_a > 0 and area_b > 0 else 0.0

def in_polygon(x, y, corners):
    """Does a ray to the right cross an odd number of edges? Corners in order, around."""
    edges = zip(corners, corners[1:] + corners[:1])
    return sum((y1 > y) != (y2 > y) and x < x1 + (y - y1) / (y2 - y1) * (x2 - x1) for (x1, y1), (x2, y2) in edges) % 2 == 1

def point_in_target(point, sample, frames):
    """1 if the point is in the box of any target, edges included, in its polygon if it has one, and in that target's image."""
    for target in sample.targets:
        x, y = to_source(point, target["image"], frames)
        x1, y1, x2, y2 = target["box"]
        in_box = x1 - EPS <= x <= x2 + EPS and y1 - EPS <= y <= y2 + EPS
        in_shape = in_box and ("polygon" not in target or in_polygon(x, y, target["polygon"]))
        if in_shape and inside(point, frames and [frames[target["image"]]]):
            return 1.0
    return 0.0

def best_iou(box, sample, frames):
    return max(iou(to_source(box, target["image"], frames), target["box"]) for target in sample.targets)

def named_image(text):
    """The image that an answer names, as 0, 1, ...: '<answer> image 2: (1, 2),(3, 4)' -> 1; None if it names none."""
    named = re.search(r"\bimage\s{0,9}([0-9]{1,9})", text[max(0, text.rfind("<answer>")):], re.IGNORECASE)
    return int(named[1]) - 1 if named else None

def plain(text):
    """Both sides of every comparison of words go through here: case folded, single spaces, no final period."""
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()

def choice_match(said, sample, frames):
    """
    1 if the answer names the right option: by its text, by its text after 'A.', 'A)' or '(A)' (then the text decides, not the
    letter), or by a lone letter. A text that equals an option is that option, even if it looks like another one's letter.
    """
    named, options = plain(said), [plain(option) for option in sample.options]
    lettered = re.fullmatch(r"\(?([a-z])(?:[.)]\s*(.*))?", named)
    if lettered and named not in options:
        letter, text = lettered.groups()
        named = text or dict(zip("abcdefghijklmnopqrstuvwxyz", options)).get(letter)
    return float(named == options[sample.answer])

def text_match(said, sample, frames):
    """The best match with any accepted string: equal, or by parts where the answer is a web action."""
    match_one = web_action if sample.meta.get("matcher") == "web_action" else lambda a, b: float(plain(a) == plain(b))
    return max(match_one(said, gold) for gold in sample.answer)

def web_action(said, gold):
    """
    ViGoRL's web action reward: 0.5 for the action word and 0.5 for its arguments, as in 'type [12] [red shoes]'.

    The argument half is split evenly, so typed text counts (the original compares the element id only), and 'stop [answer]' is
    scored like the others (the original looks at the word alone). Without arguments the word is everything. The word is read
    at the start: the original looks for 'stop' anywhere, and takes 'type [12] [bus stop]' for a stop.
    """
    def read(action):
        word = re.match(r"\W*(\w*)", plain(action))[1]
        return word, [a.strip() for a in re.findall(r"\[([^\[\]]*)\]", plain(action))[:2]]  # a third, "press enter", is optional
    (word, arguments), (gold_word, gold_arguments) = read(said), read(gold)
    same_word = float(word == gold_word)
    if not gold_arguments:
        return same_word
    return 0.5 * same_word + 0.5 * sum(a == b for a, b in zip(arguments, gold_arguments)) / len(gold_arguments)

GRADERS = {"point": point_in_target, "box": best_iou, "choice": choice_match, "text": text_match}

def judge(value, sample, frames):
    """
    -> {"accuracy", "wrong_format": 1 when no answer could be parsed, "iou": of a box, "hidden": only where it is 1}.

    hidden: the benchmark keeps its gold to itself. Nothing can be right then (accuracy 0), and whoever averages leaves it out.
    A box is right from IoU 0.5 on; the recipe univg-r1 alone takes the soft IoU for its accuracy.
    """
    hidden = not sample.targets if sample.answer_type in ("point", "box") else sample.answer in (None, [])
    worth = 0.0 if hidden or value is None else GRADERS[sample.answer_type](value, sample, frames)
    found = {"accuracy": worth, "wrong_format": float(value is None)}
    if sample.answer_type == "box":
        found |= {"accuracy": float(worth >= 0.5 - EPS), "iou": worth}
    return found | ({"hidden": 1.0} if hidden else {})

# -----------------------------------------------------------------------------
# form: is it well made?

TAG = re.compile(r"(</?(?:think|answer|tool_call|observation)>)", re.IGNORECASE)
POINT = re.compile(rf"\({TWO}\)")
CORNERS = re.compile(rf"\({TWO}\)\s*,\s*\({TWO}\)")

def action_of(turn_text):
    """-> ("answer" or "tool_call", what is in it) if the turn is exactly one thought and one action, else (None, "")."""
    match TAG.split(turn_text.strip()):  # cut at every tag: a second, nested, unclosed or stray one cannot hide
        case ["", "<think>", _, "</think>", gap, "<answer>", body, "</answer>", ""] if not gap.strip():
            return "answer", body
        case ["", "<think>", _, "</think>", gap, "<tool_call>", body, "</tool_call>", ""] if not gap.strip():
            return "tool_call", body
    return None, ""

def answers_well(turn_text, answer_type):
    """One thought, one answer, and in it what the type asks for: '(x, y)', '(x1, y1),(x2, y2)' or any words at all."""
    action, body = action_of(turn_text)
    form = {"point": POINT, "box": CORNERS}.get(answer_type)
    return action == "answer" and bool(form.fullmatch(body.strip()) if form else body.strip())

def zooms_well(turn):
    """One thought, one tool call, and the tool could do it: it gave a crop, so the point was readable and in the image."""
    return action_of(turn.text)[0] == "tool_call" and turn.crop is not None and turn.error is None

def grounded(turn_text, frames):
    """C: the thought names at least one point (x, y), and every point it names lies in an image of the prompt."""
    thought = turn_text.partition("<think>")[2].partition("</think>")[0]
    points = [(float(x), float(y)) for x, y in set(POINT.findall(thought))]
    return bool(points) and all(inside(point, frames) for point in points)

# -----------------------------------------------------------------------------
# recipes: what judge() found -> the reward, with its named parts

def vigorl(found, sample, text, frames, **_):
    """0.5 A + 0.5 F C. The original pays C for any "(1, 2)"; the paper (section 4.3) wants the points valid, and so do we."""
    form, ground = float(answers_well(text, sample.answer_type)), float(grounded(text, frames))
    return {"reward": 0.5 * found["accuracy"] + 0.5 * form * ground, "format": form, "grounded": ground}

def vigorl_zoom(found, sample, turns, frames, max_zooms, min_distance, distinct_bonus, tool_bonus, **_):
    """
    0.6 A + 0.4 F (1 + distinct). F: every turn is one thought and one zoom that worked, the last is one thought and one answer.

    distinct: +0.2 for each zoom, after the first, that is min_distance or more (Euclidean, in the model's convention) from all
    that counted before; without it the paper's policy stops looking again (V* 81.2 -> 78.0). The original has no cap, and pays
    a wrong answer after 4 zooms (0.64) more than a right one with a slip in the format (0.60). Here only zooms that worked
    count, no more of them than the episode allows, and the bonus ends at 0.4, which keeps right above wrong:

                          F = 0    F = 1    F = 1, distinct = 0.4
        wrong (A = 0)     0.00     0.40     0.56    the best of wrong ...
        right (A = 1)     0.60     1.00     1.16    ... is below 0.60, the worst of right

    tool_bonus: paid where the answer is right AND a zoom worked. DeepEyes (2505.14362): 1.2, beside 0.8 A + 0.2 F; paid to wrong
    answers too, or to none, its policy stopped zooming.
    """
    kept = []
    for turn in turns:
        if zooms_well(turn) and all(math.dist(turn.point, point) >= min_distance for point in kept):
            kept.append(turn.point)
    distinct = min(0.4, distinct_bonus * max(0, min(len(kept), max_zooms) - 1))
    form = float(bool(turns) and all(map(zooms_well, turns[:-1])) and answers_well(turns[-1].text, sample.answer_type))
    ground = sum(grounded(turn.text, frames) for turn in turns) / max(1, len(turns))  # for the log: share of turns
    looked = found["accuracy"] >= 1 and any(map(zooms_well, turns))
    reward = 0.6 * found["accuracy"] + 0.4 * form * (1 + distinct) + tool_bonus * looked
    return {"reward": reward, "format": form, "distinct": distinct, "grounded": ground}

def univg_r1(found, sample, text, **_):
    """
    IoU + F, in [0, 2]. F: the text ends in a thought and '(x1,y1),(x2,y2)' in whole numbers. What stands before the thought is
    free, as in the original; unlike there, white space in the answer and after it does no harm. 'image 2:' stands before the box
    where the sample asks for it (meta "name_image"), and nowhere else.
    """
    before, _, answer = text.rpartition("<answer>")
    corner = r"\s*\(\s*[0-9]+\s*,\s*[0-9]+\s*\)\s*"
    thought = "<think>" in before and before.rstrip().endswith("</think>")
    image = r"\s*image [0-9]+:" if sample.meta.get("name_image") else ""
    form = float(thought and bool(re.fullmatch(rf"{image}{corner},{corner}</answer>\s*", answer)))
    soft = found.get("iou", found["accuracy"])
    return {"reward": soft + form, "accuracy": soft, "format": form}

def accuracy(found, **_):
    """A alone, for evaluation; the only form asked for is that an answer can be read."""
    return {"reward": found["accuracy"], "format": 1.0 - found["wrong_format"]}

RECIPES = {"vigorl": vigorl, "vigorl-zoom": vigorl_zoom, "univg-r1": univg_r1, "accuracy": accuracy}

def score(sample, text, turns, recipe, frames=None, max_zooms=4, min_distance=10.0, distinct_bonus=0.2, tool_bonus=0.0):
    """
    Score one episode: `text` its transcript, `turns` its assistant turns (.text .point .crop .error), recipe a name in RECIPES.

    -> named floats: always "reward", "accuracy", "format" and "wrong_format"; "iou", "grounded", "distinct" and "hidden" where
    they apply. min_distance: 10 pixels of what the model sees; distinct_bonus=0 switches the bonus off.
    """
    if recipe not in RECIPES:
        raise ValueError(f"unknown reward recipe {recipe!r}, expected one of: {', '.join(RECIPES)}")
    asked, there = copy.copy(sample), sample.targets
    if sample.meta.get("name_image"):
        there = [target for target in sample.targets if target["image"] == named_image(text)]
        asked.targets = there or sample.targets
    found = judge(parse_answer(text, sample.answer_type), asked, frames)
    if sample.targets and not there:
        found |= {"accuracy": 0.0, "iou": 0.0}  # a right box in the wrong image; the original does not ask, and pays for it
    return found | RECIPES[recipe](found, sample=sample, text=text, turns=turns, frames=frames, max_zooms=max_zooms,
                                   min_distance=min_distance, distinct_bonus=distinct_bonus, tool_bonus=tool_bonus)
