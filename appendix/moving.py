"""One held-out question before and after RL, side by side, as an animated image.

    python train_rl.py                          # the policy after RL: runs/rl/checkpoint
    python train_sft.py                         # the one before: the same traces, the same seed
    python -m appendix.moving                   # .github/before-after.gif
    python -m appendix.moving --after runs/seed0/checkpoint --out slides/before-after.gif

Both policies sample with the same random numbers. The episodes unfold word by word. The scene is
drawn as the model is fed it; a tool call draws its window there, and beside it the crop of the
stored image. `before_and_after` chooses the question.
"""
import argparse
import os
import textwrap
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

import data
import rewards
import zoom_rollout
from appendix import prefix, run
from appendix.terminal import action_text, thought_of

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
WARM_START = "runs/sft/checkpoint"
LABELS = ("after the warm start", "after RL")

PANEL = 440                     # width of an episode, in pixels
SIZE = (2 * PANEL, 456)         # of the image
SCENE = 232                     # side of the scene
CROP = 168                      # side of a crop
# How long things stay, in milliseconds.
WORD = 110                      # a word
PAUSE = 1200                    # what a turn did
END = 4000                      # the end
INK, SOFT, LINE = "#1f2328", "#59636e", "#d1d9e0"
RIGHT_COLOR, WRONG_COLOR = "#1a7f37", "#cf222e"
WINDOWS = ("#ff8c1a", "#1ac6ff", "#d94cff")     # colors of the first, second and third zoom
# Lines of text below the scene, and characters of a line.
NUM_LINES = 8
LINE_LENGTH = 52


# --------------------------------------------------------------------------------------------------
# the question, and both answers to it in words

def before_and_after(before, after, seed=0):
    """A held-out question, answered by two policies with the same random numbers.

    -> (Sample, its two episodes). It is the first of fifty that the policy before RL answers with a
    wrong option and the one after RL with the right one. Raises DataError if there is none.
    """
    for i, sample in enumerate(data.toy("search", "test", 50, f"figure{seed}")):
        config = zoom_rollout.RolloutConfig(seed=i)
        pair = [zoom_rollout.rollout(vlm, [sample], config=config)[0] for vlm in (before, after)]
        first, second = [chosen_option(e) for e in pair]
        right = sample.options[sample.answer]
        if first not in (None, second) and second == right:
            return sample, pair
    raise data.DataError("no question of fifty is answered wrong before and right after; expected "
                         "a policy before RL and one after it")


def print_episodes(sample, pair):
    """The table of the README: what both episodes thought, and what they did."""
    print(f"\n*{sample.question}* (right: {sample.options[sample.answer]})\n")
    print(f"| turn | {' | '.join(LABELS)} |")
    print("|---|---|---|")
    for n in range(max(len(e.turns) for e in pair)):
        turns = [e.turns[n] if n < len(e.turns) else None for e in pair]
        print(f"| {n + 1} | {' | '.join(map(thought_of, turns))} |")
        print(f"| | {' | '.join(map(action_text, turns))} |")


def chosen_option(episode):
    """The option that an episode answered with, or None."""
    answer = rewards.parse_answer(episode.turns[-1].text, "choice")
    return answer if answer in episode.sample.options else None


def wrapped_lines(text, width=LINE_LENGTH):
    """A text as lines of at most so many characters."""
    lines = []
    for line in text.split("\n"):
        lines += textwrap.wrap(line, width) or [""]
    return lines


# --------------------------------------------------------------------------------------------------
# from an episode to moments

@dataclass
class Moment:
    """What a panel shows at a time: the words so far, the zooms so far, and how long it stays."""
    text: str
    zooms: int
    milliseconds: int = WORD
    is_over: bool = False


def moments_of(episode):
    """An episode -> list[Moment]: thoughts word by word, then what each turn did."""
    moments = []
    text = ""
    zooms = 0
    for turn in episode.turns:
        for word in thought_of(turn).split():
            text += word + " "
            moments.append(Moment(text, zooms))
        text = text.rstrip() + f"\n{action_text(turn)}\n"
        zooms += turn.crop is not None
        moments.append(Moment(text, zooms, PAUSE))
    moments.append(Moment(text, zooms, END, is_over=True))
    return moments


def in_step(a, b):
    """Two lists of moments -> [(moment of a, moment of b, milliseconds)].

    Both go on at the same time. The one that has ended stays as it is.
    """
    starts = []                                         # of each list: times at which moments begin
    for moments in (a, b):
        times = [0]
        for moment in moments[:-1]:
            times.append(times[-1] + moment.milliseconds)
        starts.append(times)
    times = sorted(set(starts[0]) | set(starts[1]))
    frames = []
    for time, after in zip(times, [*times[1:], times[-1] + END]):
        shown = []
        for moments, begins in zip((a, b), starts):
            last = max(i for i, t in enumerate(begins) if t <= time)
            shown.append(moments[last])
        frames.append((*shown, after - time))
    return frames


# --------------------------------------------------------------------------------------------------
# drawing

def draw_frame(sample, pair, moments):
    """The question, and both episodes at their moments -> PIL image."""
    page = Image.new("RGB", SIZE, "white")
    pen = ImageDraw.Draw(page)
    right = sample.options[sample.answer]
    pen.text((12, 8), sample.question, INK, ImageFont.load_default(19))
    pen.text((SIZE[0] - 12, 12), f"right: {right}", SOFT, ImageFont.load_default(15), anchor="ra")
    pen.line((PANEL, 40, PANEL, SIZE[1] - 8), LINE)
    for n, (episode, moment) in enumerate(zip(pair, moments)):
        draw_panel(page, pen, n * PANEL + 12, episode, moment, LABELS[n], right)
    return page


def last_frame(sample, pair):
    """Both episodes at their ends -> PIL image."""
    return draw_frame(sample, pair, [moments_of(episode)[-1] for episode in pair])


def draw_panel(page, pen, left, episode, moment, label, right):
    top = 64
    pen.text((left, 40), label, INK, ImageFont.load_default(16))
    view = episode.views[0]
    seen = view.pixels().resize((SCENE, SCENE), Image.Resampling.BICUBIC)   # as the model sees it
    page.paste(seen, (left, top))
    turns = [turn for turn in episode.turns if turn.crop][:moment.zooms]
    scale = SCENE / view.source.width
    for n, turn in enumerate(turns):
        color = WINDOWS[n % len(WINDOWS)]
        x1, y1, x2, y2 = [value * scale for value in turn.crop]
        pen.rectangle((left + x1, top + y1, left + x2, top + y2), outline=color, width=3)
    if turns:                                           # the last crop, enlarged
        x = left + SCENE + 12
        crop = view.source.crop(turns[-1].crop).resize((CROP, CROP), Image.Resampling.NEAREST)
        page.paste(crop, (x, top))
        pen.rectangle((x, top, x + CROP - 1, top + CROP - 1), outline=color, width=3)
    font = ImageFont.load_default(15)
    y = top + SCENE + 12
    for line in wrapped_lines(moment.text)[-NUM_LINES:]:
        pen.text((left, y), line, INK, font)
        y += 18
    if moment.is_over:
        is_right = chosen_option(episode) == right
        verdict = "right" if is_right else "wrong"
        color = RIGHT_COLOR if is_right else WRONG_COLOR
        pen.text((left + SCENE + 12, top + CROP + 24), verdict, color, ImageFont.load_default(28))


def write_gif(path, frames, durations):
    """PIL images and the milliseconds of each. All share the colors of the last one."""
    colors = frames[-1].quantize(128)
    coded = [frame.quantize(palette=colors) for frame in frames]
    run.make_dir(os.path.dirname(os.path.abspath(path)))
    coded[0].save(path, save_all=True, append_images=coded[1:], duration=durations, loop=0)


def draw_moving(sample, pair, path):
    """Write the animated image of two episodes of one sample."""
    frames = []
    durations = []
    for first, second, duration in in_step(*map(moments_of, pair)):
        frames.append(draw_frame(sample, pair, (first, second)))
        durations.append(duration)
    write_gif(path, frames, durations)


def show(before, after, path):
    """Print the table of the README and write the image. before, after: checkpoint folders."""
    policies = [prefix.load_vlm(folder, quiet=True) for folder in (before, after)]
    sample, pair = before_and_after(*policies)
    print_episodes(sample, pair)
    draw_moving(sample, pair, path)


def main(argv=None):
    parser = run.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default=WARM_START, help="policy before RL")
    parser.add_argument("--after", default="runs/rl/checkpoint", help="policy after RL")
    parser.add_argument("--out", default=os.path.join(ROOT, ".github", "before-after.gif"),
                        help="the image (default: .github/before-after.gif)")
    args = parser.parse_args(argv)
    show(args.before, args.after, args.out)
    print(args.out)


if __name__ == "__main__":
    with run.exit_on_error(interrupted="interrupted"):
        main()
