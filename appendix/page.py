"""What the HTML pages share: templates, a limit on the length of texts, pictures as data.

A page is one file that fetches nothing and can be opened anywhere. Python prepares plain data, the
templates in templates/ hold all the markup. Whatever a template writes comes from a model or from
a data file, so it is escaped; only a value of the class Markup is written as it is.
"""
import base64
import io
import os
from dataclasses import dataclass

import jinja2
from markupsafe import Markup
from PIL import Image

from appendix import files, run

# Characters of one text that a page shows.
LONGEST = 4000
# A PNG of at most so many bytes is kept even where a JPEG would be smaller: its lines are sharper.
SMALL_PNG = 60_000


# --------------------------------------------------------------------------------------------------
# templates

def clip(text, limit=LONGEST):
    """The text, or its beginning and how much is left out."""
    text = str(text)
    return text[:limit] + left_out(text, limit)


def left_out(text, limit=LONGEST):
    """What stands in place of the characters beyond the limit; "" if there are none."""
    if len(text) <= limit:
        return ""
    return f" [and {len(text) - limit:,} more characters]"


def clip_unless_markup(value):
    """The last thing that jinja2 does to each value before it is escaped and written."""
    return value if isinstance(value, Markup) else clip(value)


def short(value):
    """A number with at most six digits: a coordinate."""
    return f"{value:.6g}"


TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(os.path.join(os.path.dirname(__file__), "templates")),
    autoescape=True, finalize=clip_unless_markup, undefined=jinja2.StrictUndefined,
    trim_blocks=True, lstrip_blocks=True)
TEMPLATES.filters["clip"] = clip
TEMPLATES.filters["short"] = short


def render(template, **values):
    """Fill a template -> Markup, which other templates write as it is."""
    return Markup(TEMPLATES.get_template(template).render(values))


def source_of(name):
    """A file of templates/ as it is (a stylesheet or a script) -> Markup."""
    source, _, _ = TEMPLATES.loader.get_source(TEMPLATES, name)
    return Markup(source)


def write_html(path, template, stylesheets, **values):
    """Fill the template of a whole page and write it atomically. Later stylesheets win."""
    css = Markup("\n").join(source_of(name) for name in stylesheets)
    run.write_text(path, render(template, css=css, **values))


# --------------------------------------------------------------------------------------------------
# pictures

@dataclass
class Picture:
    """A picture of the album. What is drawn over it is in the pixels of the image as stored."""
    name: str                   # id of its element in the page
    width: int                  # of the image as stored; the picture in the page may be smaller
    height: int
    uri: Markup                 # the picture itself, as a data URI


class Album:
    """The pictures of a page. Each stands in the page once, however often it is drawn."""

    def __init__(self):
        self.pictures = {}      # {path, or (size, hash of the pixels): Picture}
        self.opened = ("", None)                # the file opened last: neighbours often share it

    @property
    def num_bytes(self):
        return sum(len(picture.uri) for picture in self.pictures.values())

    def open(self, source):
        """A path or a PIL image -> PIL image."""
        if isinstance(source, files.IN_MEMORY):
            return source
        if self.opened[0] != source:
            self.opened = (source, files.open_image(source))
        return self.opened[1]

    def add(self, source, max_side):
        """The Picture of an image or of the file at a path, at most max_side pixels a side."""
        key = source
        if isinstance(source, files.IN_MEMORY):
            key = (source.size, hash(source.tobytes()))
        if key not in self.pictures:
            image = self.open(source)
            uri = data_uri(image, max_side)
            name = f"p{len(self.pictures)}"
            self.pictures[key] = Picture(name, image.width, image.height, uri)
        return self.pictures[key]


def data_uri(image, max_side):
    """The image, shrunk to at most max_side pixels a side, as a data URI."""
    small = image.copy()
    small.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    png = encoded(small, "png")
    jpeg = encoded(small, "jpeg", quality=86)
    if len(png) < max(SMALL_PNG, len(jpeg)):
        return Markup("data:image/png;base64," + base64.b64encode(png).decode())
    return Markup("data:image/jpeg;base64," + base64.b64encode(jpeg).decode())


def encoded(image, kind, **options):
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
