"""A picture of the algorithm, drawn from episodes that really happened.

    python train_sft.py                         # a policy after its warm start: runs/sft/checkpoint
    python -m appendix.picture                  # .github/algorithm-light.svg and algorithm-dark.svg
    python -m appendix.picture --checkpoint runs/rl/checkpoint --out slides

One prompt, a group of tries, and of one try every token: who wrote it, its log-probability, and
whether it is trained on. Then the rewards of the group and the advantages that follow from them.

The prompt is the first of fifty training questions whose group has two right tries, two wrong ones,
and three different rewards. The try that is drawn is the first that looked where the answer is and
answered right. Nothing else is chosen.

Shapes:  G tries of the prompt (the group)
"""
import argparse
import base64
import io
import os
from dataclasses import dataclass
from xml.sax.saxutils import escape

import torch

import data
import grpo
import rewards
import zoom_rollout
from appendix import evidence, prefix, run

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
WARM_START = "runs/sft/checkpoint"
GROUP_SIZE = 8
RECIPE = "vigorl-zoom"
MAX_ZOOMS = 3


@dataclass(frozen=True)
class Palette:
    """Colors of one variant of the picture."""
    page: str
    ink: str
    soft: str                       # text that matters less
    line: str
    sampled: str                    # a token that the policy chose
    sampled_edge: str
    call: str                       # the same, inside a tool call
    call_edge: str
    given: str                      # tokens of the environment
    given_edge: str
    up: str                         # made more likely
    down: str                       # made less likely


LIGHT = Palette(
    page="#ffffff", ink="#1f2328", soft="#59636e", line="#d1d9e0",
    sampled="#dbe9ff", sampled_edge="#2f6fde", call="#eadfff", call_edge="#7a4fd6",
    given="#eef0f2", given_edge="#9aa3ad", up="#1a7f37", down="#cf222e")
DARK = Palette(
    page="#0d1117", ink="#f0f6fc", soft="#9aa4af", line="#3d444d",
    sampled="#12305e", sampled_edge="#6ea8ff", call="#35245f", call_edge="#b794ff",
    given="#1c2128", given_edge="#6b7580", up="#3fb950", down="#ff6a61")
VARIANTS = {"light": LIGHT, "dark": DARK}


# --------------------------------------------------------------------------------------------------
# a group

@dataclass
class Group:
    """G tries of one prompt. rewards, advantages: a number per try. shown: the try to draw."""
    episodes: list
    rewards: list
    advantages: list
    shown: int

    @property
    def sample(self):
        return self.episodes[0].sample


def find_group(vlm, seed=0):
    """The first group of fifty that has something to show -> Group. Raises DataError."""
    for i, sample in enumerate(data.toy("search", "train", 50, f"picture{seed}")):
        config = zoom_rollout.RolloutConfig(seed=i, max_zooms=MAX_ZOOMS)
        group = score(zoom_rollout.rollout(vlm, [sample], GROUP_SIZE, config))
        right = sum(e.reward_components["accuracy"] == 1 for e in group.episodes)
        is_mixed = 2 <= right <= GROUP_SIZE - 2 and len(set(group.rewards)) >= 3
        if is_mixed and looked_and_was_right(group.episodes[group.shown]):
            return group
    raise data.DataError(
        "no group of fifty has two right tries, two wrong ones and three different rewards; "
        "expected a policy after its warm start (python train_sft.py)")


def score(episodes):
    """The episodes of one prompt -> Group. Shown is the first that looked and was right, if any."""
    for e in episodes:
        e.reward_components = rewards.score(
            e.sample, e.text, e.turns, RECIPE, e.frames, MAX_ZOOMS)
    values = [e.reward_components["reward"] for e in episodes]
    advantages = grpo.group_advantages(torch.tensor([values]))[0].tolist()
    good = [i for i, e in enumerate(episodes) if looked_and_was_right(e)]
    shown = good[0] if good else 0
    return Group(episodes, values, advantages, shown)


def looked_and_was_right(episode):
    """Did it zoom once, into the right object, and answer right?"""
    is_right = episode.reward_components["accuracy"] == 1
    return is_right and len(episode.turns) == 2 and bool(evidence.saw(episode))


# --------------------------------------------------------------------------------------------------
# the tokens of a try

@dataclass
class Piece:
    """A token that the policy chose, or all tokens that the environment put between two such."""
    text: str
    logprob: float = None           # None: given by the environment
    in_call: bool = False           # part of a tool call
    tokens: int = 1
    view: int = 0                   # number of the crop among the episode's views; 0: none


def pieces_of(vlm, episode):
    """What follows the prompt -> list[Piece]."""
    pieces = []
    in_call = False
    given = []                                          # ids since the last token of the policy
    first = episode.completion_mask.index(True)
    num_views = episode.ids[:first].count(vlm.vision_start)
    for i in range(first, len(episode.ids)):
        if not episode.completion_mask[i]:
            given.append(episode.ids[i])
            continue
        if given:
            has_crop = vlm.vision_start in given
            view = num_views if has_crop else 0
            pieces.append(Piece("observation", tokens=len(given), view=view))
            num_views += has_crop
            given = []
        text = vlm.text([episode.ids[i]])
        in_call = in_call or "<tool_call>" in text
        pieces.append(Piece(in_short(text), episode.logprobs[i], in_call))
        in_call = in_call and "</tool_call>" not in text
    return pieces


def in_short(text):
    """A token as the picture writes it: the long ones of a tool call are cut."""
    if text == data.TOOL_OPEN:
        return "<tool_call> … ["
    if text == data.TOOL_CLOSE:
        return "] … </tool_call>"
    return text.strip() or "↵"


# --------------------------------------------------------------------------------------------------
# SVG

SANS = "ui-sans-serif, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
CHARACTER = 7.3                     # pixels of a character of the token font, at 12 pixels


def words(x, y, text, color, size=13, anchor="start", weight="normal", mono=False):
    """A line of text whose baseline begins, ends or has its middle at (x, y)."""
    font = f' font-family="{MONO}"' if mono else ""
    return (f'<text x="{x:.1f}" y="{y:.1f}" fill="{color}" font-size="{size}" '
            f'text-anchor="{anchor}" font-weight="{weight}"{font}>{escape(text)}</text>')


def box(x, y, width, height, fill, edge, more=""):
    return (f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="3" '
            f'fill="{fill}" stroke="{edge}" {more}/>')


def image_tag(name, pixels):
    """A PIL image as an SVG image one unit wide and high, to be scaled where it is used."""
    file = io.BytesIO()
    pixels.convert("RGB").save(file, "PNG", optimize=True)
    coded = base64.b64encode(file.getvalue()).decode()
    return (f'<image id="{name}" width="1" height="1" preserveAspectRatio="none" '
            f'href="data:image/png;base64,{coded}"/>')


def use_image(name, x, y, side):
    return f'<use href="#{name}" transform="translate({x:.1f} {y:.1f}) scale({side})"/>'


# --------------------------------------------------------------------------------------------------
# the picture, from top to bottom. Each part returns lines of SVG.

WIDTH = 900
LEFT = 22
RIGHT = WIDTH - 22
PROMPT_TOP = 24                     # the prompt
SCENE = 136                         # side of the drawn scene
TRY_TOP = 216                       # the tokens of a try
BOX = 22                            # height of a token
LONGEST_BAR = 24                    # of a log-probability
BAND = BOX + LONGEST_BAR + 28       # from one line of tokens to the next
MINI = 84                           # side of a scene in the group


def draw(vlm, group, palette):
    """Group -> the whole picture as SVG."""
    episode = group.episodes[group.shown]
    tokens, bottom = draw_tokens(pieces_of(vlm, episode), palette)
    group_top = bottom + 34
    height = group_top + 286
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'font-family="{SANS}">',
        "<title>One prompt, a group of tries, their rewards and advantages</title>",
        "<defs>",
        image_tag("scene", episode.views[0].pixels()),
        *[image_tag(f"crop{n}", view.pixels()) for n, view in enumerate(episode.views) if n > 0],
        "</defs>",
        f'<rect width="{WIDTH}" height="{height:.0f}" fill="{palette.page}"/>',
        *draw_prompt(group, palette),
        *tokens,
        *draw_group(group, palette, group_top),
        "</svg>",
    ]) + "\n"


def draw_prompt(group, palette):
    """The image as the model is fed it, the question, and what the colors mean."""
    episode = group.episodes[group.shown]
    sample = group.sample
    fed = episode.views[0].fed
    tokens = episode.completion_mask.index(True)
    top = PROMPT_TOP
    x = LEFT + SCENE + 24
    options = ", ".join(f"{chr(ord('A') + i)}. {o}" for i, o in enumerate(sample.options))
    svg = [
        words(LEFT, top, "1. The prompt", palette.ink, 16, weight="bold"),
        use_image("scene", LEFT, top + 14, SCENE),
        *windows(episode, LEFT, top + 14, SCENE, palette.call_edge),
        words(x, top + 30, sample.question, palette.ink, 17, weight="bold"),
        words(x, top + 54, options, palette.ink, 14),
        words(x, top + 82, f"The image is stored with {episode.views[0].source.width} pixels a "
              f"side and fed with {fed[0]}: its patterns are gone.", palette.soft),
        words(x, top + 101, f"{tokens} tokens, computed once for the {len(group.episodes)} tries. "
              "The square is where the try below looks.", palette.soft),
    ]
    y = top + 124
    for fill, edge, text in (
            (palette.sampled, palette.sampled_edge, "sampled by the policy, trained on: mask 1"),
            (palette.call, palette.call_edge, "the same, in a tool call"),
            (palette.given, palette.given_edge, "given by the environment: mask 0")):
        svg.append(box(x, y, 16, 14, fill, edge))
        svg.append(words(x + 22, y + 12, text, palette.ink))
        x += 38 + 6.3 * len(text)
    return svg


def windows(episode, left, top, side, color):
    """The windows that a try has looked at, as squares on a scene of this side."""
    scale = side / episode.views[0].source.width
    svg = []
    for turn in episode.turns:
        if turn.crop:
            x1, y1, x2, y2 = [value * scale for value in turn.crop]
            svg.append(box(left + x1, top + y1, x2 - x1, y2 - y1, "none", color,
                           'stroke-width="2.5"'))
    return svg


def draw_tokens(pieces, palette):
    """The tokens in lines, each with its log-probability and its mask -> (SVG, lower edge)."""
    longest = max(-piece.logprob for piece in pieces if piece.logprob is not None) or 1.0
    svg = [
        words(LEFT, TRY_TOP, "2. One try, token by token", palette.ink, 16, weight="bold"),
        words(LEFT + 226, TRY_TOP, "A bar is the token's −log p: the longer, the less likely it "
              f"was. The longest is {longest:.1f}.", palette.soft),
    ]
    x = LEFT
    y = TRY_TOP + 16
    for piece in pieces:
        width = piece_width(piece)
        if x + width > RIGHT:
            x = LEFT
            y += BAND
        draw_piece = draw_sampled if piece.logprob is not None else draw_given
        svg += draw_piece(piece, x, y, width, longest, palette)
        x += width + 4
    return svg, y + BAND - 12


def piece_width(piece):
    if piece.logprob is None:
        return 190
    return CHARACTER * len(piece.text) + 9


def draw_sampled(piece, x, y, width, longest, palette):
    fill = palette.call if piece.in_call else palette.sampled
    edge = palette.call_edge if piece.in_call else palette.sampled_edge
    middle = x + width / 2
    bar = max(LONGEST_BAR * -piece.logprob / longest, 0.8)
    return [
        box(x, y, width, BOX, fill, edge),
        words(middle, y + 15, piece.text, palette.ink, 12, "middle", mono=True),
        f'<rect x="{middle - 3:.1f}" y="{y + BOX + 2:.1f}" width="6" height="{bar:.1f}" '
        f'fill="{edge}"/>',
        words(middle, y + BOX + LONGEST_BAR + 14, "1", palette.soft, 11, "middle"),
    ]


def draw_given(piece, x, y, width, longest, palette):
    """What the environment put in: a crop, in a box as high as a whole line of tokens."""
    height = BOX + LONGEST_BAR + 2
    side = height - 6
    shows = "a crop" if piece.view else "an error"
    svg = [
        box(x, y, width, height, palette.given, palette.given_edge, 'stroke-dasharray="4 3"'),
        words(x + 8, y + 20, "observation", palette.ink, 12, mono=True),
        words(x + 8, y + 36, f"{piece.tokens} tokens: {shows}", palette.soft, 12),
        words(x + width / 2, y + BOX + LONGEST_BAR + 14, "0", palette.soft, 11, "middle"),
    ]
    if piece.view:
        svg.append(use_image(f"crop{piece.view}", x + width - side - 4, y + 3, side))
    return svg


def draw_group(group, palette, top):
    """Every try as a column: where it looked, what it answered, its reward, its advantage."""
    mean = sum(group.rewards) / len(group.rewards)
    svg = [
        words(LEFT, top, "3. The group", palette.ink, 16, weight="bold"),
        words(LEFT + 116, top, f"r = 0.6 A + 0.4 F: right answer, good form. Mean {mean:.2f}. "
              "Advantage = (r − mean) / std, the same for every token of a try with mask 1.",
              palette.soft),
    ]
    step = (RIGHT - LEFT) / len(group.episodes)
    largest = max(map(abs, group.advantages)) or 1.0
    for i in range(len(group.episodes)):
        left = LEFT + i * step + (step - MINI) / 2
        svg += draw_column(group, i, left, top + 16, largest, palette)
    svg.append(words(LEFT, top + 268, "The loss is the mean of −advantage × ratio over all tokens "
                     "with mask 1: a green try becomes more likely, a red one less.", palette.ink))
    return svg


def draw_column(group, i, left, top, largest, palette):
    """Try i of the group, in a column whose scene begins at (left, top)."""
    episode = group.episodes[i]
    parts = episode.reward_components
    advantage = group.advantages[i]
    color = palette.up if advantage > 0 else palette.down
    middle = left + MINI / 2
    answer = rewards.parse_answer(episode.text, episode.sample.answer_type) or "no answer"
    zero = top + MINI + 92
    bar = 34 * abs(advantage) / largest
    bar_top = zero - bar if advantage > 0 else zero
    label_y = zero + 14 if advantage > 0 else zero - 5
    svg = []
    if i == group.shown:
        svg.append(box(left - 7, top - 7, MINI + 14, 232, "none", palette.sampled_edge,
                       'stroke-width="2"'))
    svg += [
        use_image("scene", left, top, MINI),
        *windows(episode, left, top, MINI, palette.call_edge),
        words(middle, top + MINI + 17, answer, palette.ink, 13, "middle", "bold"),
        words(middle, top + MINI + 34, f"A = {parts['accuracy']:.0f}, F = {parts['format']:.0f}",
              palette.soft, 12, "middle"),
        words(middle, top + MINI + 51, f"r = {parts['reward']:.1f}", palette.ink, 13, "middle"),
        f'<rect x="{middle - 14:.1f}" y="{bar_top:.1f}" width="28" height="{bar:.1f}" '
        f'fill="{color}"/>',
        f'<path d="M{left:.1f} {zero:.1f}h{MINI}" stroke="{palette.line}"/>',
        words(middle, label_y, f"{advantage:+.2f}", color, 13, "middle", "bold"),
    ]
    return svg


# --------------------------------------------------------------------------------------------------

@dataclass
class Drawing:
    """SVG that a notebook shows."""
    svg: str

    def _repr_svg_(self):
        return self.svg


def load(checkpoint):
    return prefix.load_vlm(checkpoint, quiet=True)


def write_variants(vlm, folder):
    """Draw algorithm-light.svg and algorithm-dark.svg in a folder -> their paths."""
    group = find_group(vlm)
    paths = []
    for name, palette in VARIANTS.items():
        path = os.path.join(run.make_dir(folder), f"algorithm-{name}.svg")
        run.write_text(path, draw(vlm, group, palette))
        paths.append(path)
    return paths


def main(argv=None):
    parser = run.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=WARM_START,
                        help=f"policy that acts (default: {WARM_START})")
    parser.add_argument("--out", default=os.path.join(ROOT, ".github"),
                        help="folder of the pictures (default: .github)")
    args = parser.parse_args(argv)
    for path in write_variants(load(args.checkpoint), args.out):
        print(path)


if __name__ == "__main__":
    with run.exit_on_error(interrupted="interrupted"):
        main()
