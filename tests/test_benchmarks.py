"""Is every published layout read as it is meant: the right box in the right pixels of the right
image, the right option? Would the gold answers, fed back as predictions, be scored as right, and is
every row named whose gold would not be? The rows here are our own, in the layouts (keys, types,
conventions, oddities) of the published files. At the end MUTATIONS puts bugs into the readers.
"""
import collections, dataclasses, io, json, os, pickle, random, sys, types

import pytest
from PIL import Image

import data, evaluate, rewards
from appendix import benchmarks, files, predictions
from appendix import convert as converting
from conftest import check_mutation, names

A, B, C = "a.png", "b.jpg", "sub/c.png"             # 200 x 100, 400 x 300, 50 x 80
SIZES = {A: (200, 100), B: (400, 300), C: (50, 80)}

def encoded(kind="png", size=(200, 100)):
    file = io.BytesIO()
    Image.new("RGB", size, "navy").save(file, kind)
    return file.getvalue()

FILES = {name: encoded("jpeg" if name.endswith("jpg") else "png", size)
         for name, size in SIZES.items()}

@pytest.fixture
def folder(tmp_path):
    for name, content in FILES.items():
        put(tmp_path, name, content)
    return tmp_path

def put(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes)
                     else (content if isinstance(content, str) else json.dumps(content)).encode())
    return str(path)

def convert(name, path, **options):
    """-> samples, as they are after a round trip through a file, checked."""
    samples, counts, _ = converting.convert(name, path, **options)
    converting.check(name, samples, counts)
    out = os.path.join(os.path.dirname(path), "out", "converted.jsonl")
    data.write_jsonl(out, samples)
    back = data.read_jsonl(out)
    for old, new in zip(samples, back, strict=True):
        assert dataclasses.replace(new, images=[]) == dataclasses.replace(old, images=[])
        assert ([files.sample_image(new, i).tobytes() for i in range(len(new.images))]
                == [files.sample_image(old, i).tobytes() for i in range(len(old.images))])
        assert (converting.why_unscorable(new)
                or rewards.score(new, converting.gold_prediction(new), [],
                                 "accuracy")["reward"] == 1)
    return back

def agree(sample, want):
    for key, value in want.items():
        assert getattr(sample, key) == value, key

def box(x1, y1, x2, y2, image=0):
    return [{"image": image, "box": pytest.approx([x1, y1, x2, y2])}]

# -----------------------------------------------------------------------------
# one row of each layout that is JSON

LETTERED = ("How many cups?\n(A) one\n(B) two\n(C) three\n"
            "Answer with the option's letter from the given choices directly.")
ASKED = ("<image>\nQuestion: Is the cup left?\nAnswer Choices:\nA. Yes\nB. No\n"
         "Answer with the text of the option.")

def turns(*values):
    return [{"from": who, "value": value} for who, value in zip(["human", "gpt"] * 2, values)]

POINTING = ("There is a sink. Pinpoint several points in front of it. "
            "Your answer should be formatted as a list of tuples, between 0 and 1.")

ROWS = {
    "vstar file": (
        {"target_object": ["cup"], "bbox": [[10, 20, 30, 40]], "question": "What is it?",
         "options": ["tin", "wood"], "image": A},
        dict(question="What is it?", options=["tin", "wood"], answer=0)),
    "vstar jsonl": (
        {"image": A, "text": LETTERED, "category": "direct_attributes", "label": "B",
         "question_id": "7"},
        dict(id="7", question="How many cups?", options=["one", "two", "three"], answer=1,
             category=["direct_attributes"])),
    "blink json": (
        {"query": "<img src='../x/a.png'> Is it left?\nSelect from the following choices.\n\n"
                  "(A) yes\n(B) no\n",
         "images": [A, C], "answer": "(B)"},
        dict(question="Is it left?", options=["yes", "no"], answer=1, images=2)),
    "sat json": (
        {"question_type": "obj_movement", "question": "did it move?",
         "answer_choices": ["Left in the first frame", "right"],
         "correct_answer": "left in the first frame ", "img_paths": [A, B]},
        dict(question="did it move?", options=["Left", "right"], answer=0,
             category=["obj_movement"], images=2)),
    "robospatial yes": (
        {"category": "configuration", "question": "Is the cup left? Answer yes or no.",
         "answer": "No", "img": A},
        dict(question="Is the cup left?", options=["yes", "no"], answer=1,
             category=["configuration"])),
    "robospatial": (
        {"category": "context", "question": POINTING,
         "answer": "[(0.25, 0.5), (.75, 0.5), (0.25, 1.0), (0.75, 1)]", "img": A},
        dict(question="There is a sink. Pinpoint several points in front of it.",
             answer_type="point", category=["context"])),
    "screenspot": (
        {"img_filename": A, "bbox": [10, 20, 100, 50], "instruction": "close",
         "data_type": "icon", "data_source": "windows"},
        dict(question="close", answer_type="point", targets=box(10, 20, 110, 70),
             category=["a.png", "icon"])),
    "screenspot_v2": (
        {"img_filename": A, "bbox": [10, 20, 100, 50], "instruction": "close",
         "data_type": "icon", "data_source": "windows"},
        dict(question="close", answer_type="point", targets=box(10, 20, 110, 70))),
    "screenspot_pro": (
        {"img_filename": A, "bbox": [35, -1, 51, 19], "instruction": "turn",
         "instruction_cn": "转", "id": "inv_0", "application": "inv", "platform": "windows",
         "img_size": [200, 100], "ui_type": "icon", "group": "CAD"},
        dict(id="inv_0", answer_type="point", targets=box(35, 0, 51, 19),
             category=["CAD", "inv", "icon"])),
    "vigorl eval": (
        {"id": 0, "image": A, "conversations": turns(ASKED, "no"), "source": "x"},
        dict(id="0", question="Is the cup left?", options=["Yes", "No"], answer=1)),
    "vigorl box": (
        {"id": 3, "image": A,
         "conversations": turns("<image>\nDescription: the cart", "(10, 20, 30, 40)")},
        dict(id="3", question="the cart", answer_type="point", targets=box(10, 20, 30, 40))),
    "vigorl rl": (
        {"problem": "<image>\n" + LETTERED, "answer": "C", "images": [A]},
        dict(question="How many cups?", answer=2)),
    "vigorl paths": (
        {"problem": "<image>\n" + LETTERED, "answer": "C", "image_paths": [A]},
        dict(question="How many cups?", answer=2)),
    "vigorl web": (
        {"problem": "<image>\nOBJECTIVE: buy\n\n"
                    "PREVIOUS ACTIONS: \n1. type  [INPUT] [] [red]\n\nIMAGE:\n",
         "answer": "type [4] [red [x]]", "images": [A]},
        dict(answer_type="text", answer=["type [4] [red [x]]"])),
    "univg-r1": (
        {"question": "<image>\n<image>\nFind it in the first image.",
         "answer": [100, 200, 500, 1000], "images": [A, B]},
        dict(question="Find it in the first image.", answer_type="box",
             targets=box(20, 20, 100, 100), images=2)),
    "mgrounding": (
        {"id": "5", "images": [A, B],
         "conversations": turns(
             "<image>\n<image>\nFind <|object_ref_start|>a cup<|object_ref_end|>.",
             "It's in the second image. <|box_start|>(100,200),(500,1000)<|box_end|>",
             "Sure?", "Yes."),
         "type": "gg_train"},
        dict(id="5_0", question="Find <|object_ref_start|>a cup<|object_ref_end|>.",
             answer_type="box", targets=box(40, 60, 200, 300, 1), images=2)),
    "mig_bench": (
        {"task": "diff", "images": [A, B], "question": "What differs? ",
         "answer": [0.1, 0.2, 0.5, 1.048], "additional_info": "", "need_format": True},
        dict(targets=box(40, 60, 200, 314.4, 1), category=["diff"], images=2)),
    "mig_bench_revised": (
        {"task": "diff", "images": [A, B], "question": "What differs?",
         "answer": [100, 200, 500, 1000]},
        dict(targets=box(40, 60, 200, 300, 1), category=["diff"], images=2)),
    "lisa": (
        {"image_path": A, "instruction": "what drives",
         "boxes": [[10.5, 20, 30, 40], [1, 2, 3, 4]]},
        dict(question="what drives", answer_type="box", targets=box(10.5, 20, 30, 40))),
    "llmseg": (
        {"image_path": A, "question": "what drives?", "bbox": [[10, 20], [30, 40]]},
        dict(answer_type="box", targets=box(10, 20, 30, 40))),
    "reasonvos": (
        {"image_list": [A, C, B], "question": "the dog",
         "bbox_list": ["1 2 3 4", "[5, 6, 7, 8]", "[10.5, 20.0, 30.25, 40]"]},
        dict(targets=box(10.5, 20, 30.25, 40, 2), images=3)),
    "refcoco_parquet": (
        {"question_id": "469", "file_name": "COCO_train2014_000000000016_0.jpg",
         "answer": ["the man", "in green"], "bbox": [10, 20, 100, 50.5]},
        dict(id="469_0", question="the man", answer_type="box",
             targets=box(10, 20, 110, 70.5))),
    "vlm-r1": (
        {"image": A, "problem": "Please find the cup.", "solution": [10.0, 20.0, 30.0, 40.0]},
        dict(question="Please find the cup.", answer_type="box", targets=box(10, 20, 30, 40))),
}

def coco(folder):
    put(folder, "COCO_train2014_000000000016.jpg", FILES[B])

@pytest.mark.parametrize("case", ROWS)
def test_row(case, folder):
    """Bug: a box read in another layout, in pixels of another image; another option; a format
    sentence left in the question."""
    coco(folder)
    row, want = ROWS[case]
    name = case.split()[0]
    first, *more = convert(name, put(folder, f"{name}.json", [row, row]))
    assert len(first.images) == want.get("images", 1)
    agree(first, {k: v for k, v in want.items() if k != "images"})
    assert (len({s.id for s in [first, *more]}) == len(more) + 1 >= 2
            and first.meta["benchmark"] == name)
    if "jsonl" not in case:
        jsonl = put(folder, f"{name}.jsonl", "\n".join([json.dumps(row)] * 2))
        assert (converting.convert(name, jsonl)[0]
                == converting.convert(name, str(folder / f"{name}.json"))[0])

def test_whole_range_of_ids(folder):
    """Bug: the id 0 counts as none; of two rows with one id, one prediction answers both."""
    rows = [{**ROWS["vigorl eval"][0], "id": i} for i in (0, 1, 1)]
    assert ([s.id for s in convert("vigorl", put(folder, "rows.json", rows))]
            == ["0", "1", "vigorl/2"])

# -----------------------------------------------------------------------------
# layouts of their own: folders, parquet, pickle

@pytest.fixture(autouse=True)
def pyarrow(monkeypatch):
    """Where pyarrow is not installed, as much of it as files.py uses; its files are then
    pickles."""
    try:
        import pyarrow.parquet
    except ImportError:
        class ParquetFile:
            def __init__(self, path):
                with open(path, "rb") as f:
                    self.rows = pickle.load(f)
            def __enter__(self):
                return self
            def __exit__(self, *_):
                pass
            def iter_batches(self, n):
                return [types.SimpleNamespace(to_pylist=lambda part=self.rows[i:i + n]: part)
                        for i in range(0, len(self.rows), n)]
        stub = types.SimpleNamespace(ParquetFile=ParquetFile)
        monkeypatch.setitem(sys.modules, "pyarrow", types.SimpleNamespace(parquet=stub))
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", stub)

def put_parquet(folder, name, rows):
    import pyarrow
    if hasattr(pyarrow, "Table"):
        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        return put(folder, name, file.getvalue())
    return put(folder, name, pickle.dumps(rows))

def test_vstar_folder(folder):
    """Bug: the other two folders count too, a stray file ends the walk, or the .jsonl beside them
    doubles every question."""
    for kind, n in (("direct_attributes", 1), ("relative_position", 2),
                    ("OCR", 1), ("GPT4V-hard", 1)):
        put(folder, f"v/{kind}/sa_{n}.jpg", FILES[B])
        boxes = [[10, 20, 30, 40], [1, 2, 3, 4]][:n]
        put(folder, f"v/{kind}/sa_{n}.json",
            {"target_object": ["cup"] * n, "bbox": boxes, "question": f"{kind}?",
             "options": ["tin", "wood"]})
        put(folder, f"v/{kind}/.DS_Store", b"\0\1")
    put(folder, "v/test_questions.jsonl", ROWS["vstar jsonl"][0])
    one, two = convert("vstar", str(folder / "v"))
    agree(one, dict(question="direct_attributes?", options=["tin", "wood"], answer=0,
                    category=["direct_attributes"]))
    assert (one.meta["evidence"] == box(10, 20, 40, 60)
            and two.images[0].endswith("relative_position/sa_2.jpg"))
    assert [e["box"] for e in two.meta["evidence"]] == [[10, 20, 40, 60], [1, 2, 4, 6]]
    assert (convert("vstar", str(folder / "v" / "direct_attributes"))[0].category
            == ["direct_attributes"])
    with pytest.raises(data.DataError, match="holds no rows; expected the published file of vstar"):
        converting.convert("vstar", str(folder / "sub"))

def test_blink_parquet(folder, capsys):
    """Bug: image_2 to image_4 lost; the hidden gold of the test split taken for an answer, or
    counted as a fault."""
    picture = lambda name: {"bytes": FILES[name], "path": None}

    def row(idx, answer, *images):
        return {"idx": idx, "sub_task": "x", "question": "Which?",
                "prompt": "Which is it?\nSelect from the following choices.\n(A) 1\n(B) 2",
                "choices": ["the 1st", "the 2nd"], "answer": answer, "explanation": "",
                **{f"image_{i}": im for i, im in enumerate(images, 1)}}

    put_parquet(folder, "blink/Jigsaw/val-00000-of-00001.parquet",
                [row("val_Jigsaw_1", "(B)", picture(A), picture(B), picture(A), None)])
    put_parquet(folder, "blink/IQ_Test/test-00000-of-00001.parquet",
                [row("test_IQ_Test_4", "hidden", picture(B), None, None, None)])
    hidden, shown = convert("blink", str(folder / "blink"))
    agree(shown, dict(id="val_Jigsaw_1", question="Which is it?", options=["the 1st", "the 2nd"],
                      answer=1, category=["Jigsaw", "val"]))
    assert ([os.path.basename(name) for name in shown.images]
            == ["converted_1_0.png", "converted_1_1.jpg", "converted_1_2.png"])
    with open(shown.images[1], "rb") as f:
        assert f.read() == FILES[B]                     # as published: not encoded again
    agree(hidden, dict(id="test_IQ_Test_4", answer=None, category=["IQ_Test", "test"]))
    assert (converting.why_unscorable(hidden) == "hidden"
            and ", 1 are hidden" in capsys.readouterr().out)
    assert [s.id for s in convert("blink", str(folder / "blink"), only="val")] == ["val_Jigsaw_1"]

@pytest.mark.parametrize("key", ["image_bytes", "images"])
def test_sat_parquet(folder, key):
    """Bug: only one of the two packagings (bytes, or dicts of bytes) is read."""
    wrap = (lambda b: b) if key == "image_bytes" else (lambda b: {"bytes": b, "path": "x.png"})
    rows = [{key: [wrap(FILES[n]) for n in (A, B)], "question": "how did it turn?",
             "answers": ["left", "right"], "correct_answer": "left",
             "question_type": "ego_movement"}]
    s, = convert("sat", put_parquet(folder, "SAT_test.parquet", rows))
    assert (len(s.images) == 2 and "start of a video" in s.question
            and s.question.endswith("how did it turn?"))
    agree(s, dict(options=["left", "right"], answer=0, category=["ego_movement"]))

def test_screenspot_parquet(folder):
    """Bug: the parquet copy's 0-1 corners taken for pixels, or for x, y, width, height."""
    row = {"file_name": "pc_1.png", "bbox": [0.1, 0.2, 0.5, 0.7], "instruction": "close",
           "data_type": "text", "data_source": "macos",
           "image": {"bytes": FILES[A], "path": "pc_1.png"}}
    s, = convert("screenspot_parquet", put_parquet(folder, "test.parquet", [row]))
    agree(s, dict(question="close", answer_type="point", targets=box(20, 20, 100, 70),
                  category=["desktop", "text"]))

def test_webp_in_parquet(folder):
    """Bug: bytes that are neither PNG nor JPEG are written under a name that lies, or not at
    all."""
    row = {**ROWS["robospatial yes"][0], "img": {"bytes": encoded("webp"), "path": None}}
    s, = convert("robospatial", put_parquet(folder, "x.parquet", [row]))
    assert Image.open(s.images[0]).format == "PNG"

def test_robospatial_place(folder):
    """Bug: the published corners, which come in Z order, taken as they come: half of the free place
    would be wrong."""
    s, = convert("robospatial", put(folder, "r.json", [ROWS["robospatial"][0]]))
    said = lambda x, y: rewards.score(s, f"<answer> ({x}, {y}) </answer>", [], "accuracy")["reward"]
    assert s.targets[0]["box"] == [50, 50, 150, 100]
    assert [said(*p) for p in [(100, 55), (55, 75), (145, 75), (100, 95)]] == [1, 1, 1, 1]
    assert [said(*p) for p in [(100, 45), (45, 75), (155, 75), (100, 105)]] == [0, 0, 0, 0]
    slanted, = convert("robospatial", put(folder, "r.json", [
        {**ROWS["robospatial"][0], "answer": "[(0, 0), (1, 0), (1, 1)]"}]))
    assert [rewards.score(slanted, f"({x}, {y})", [], "accuracy")["reward"]
            for x, y in [(150, 20), (50, 80)]] == [1, 0]

def test_robospatial_parquet(folder):
    """Bug: the pictures of the parquet file (the photo, a depth map, for context a mask) are not
    read, or another than the photo."""
    picture = lambda name: {"bytes": FILES[name], "path": None}
    row = lambda case, mask: {**ROWS[case][0], "img": picture(A), "depth_image": picture(C),
                              "mask": mask}
    put_parquet(folder, "robo/data/configuration-00000-of-00001.parquet",
                [row("robospatial yes", None)])
    put_parquet(folder, "robo/data/context-00000-of-00001.parquet",
                [row("robospatial", picture(B))])
    asked, place = convert("robospatial", str(folder / "robo"))
    agree(asked, ROWS["robospatial yes"][1]), agree(place, ROWS["robospatial"][1])
    assert (files.sample_image(asked, 0).size == files.sample_image(place, 0).size == SIZES[A]
            and place.targets[0]["box"] == [50, 50, 150, 100])

def test_revos(folder):
    """Bug: frames sorted as text (10 before 2), a stray file counted as one, or another frame than
    the third asked about."""
    for name in ["10.jpg", "2.jpg", "1.jpg", "0.jpg", ".DS_Store1", "notes"]:
        put(folder, f"videos/v1/{name}", FILES[B])
    row = {"video_id": "v1", "frames": [0, 2, 3], "question": "the dog",
           "bbox_list": [[0, 0, 2, 2], [0, 0, 2, 2], [10, 20, 110, 220]]}
    s, = convert("revos", put(folder, "ReVOS_eval.json", [row]), images=str(folder / "videos"))
    assert ([os.path.basename(p) for p in s.images] == ["0.jpg", "2.jpg", "10.jpg"]
            and s.targets == box(10, 20, 110, 220, 2))
    for change, missing in [({"frames": [0, 1, 4]}, r"image v1/\(frame 4\)"),
                            ({"video_id": "v2"}, r"image v2/\(frame 0\)")]:
        with pytest.raises(data.DataError, match=f"record 1: {missing} is not in .*videos"):
            converting.convert("revos", put(folder, "ReVOS_eval.json", [{**row, **change}]),
                               str(folder / "videos"))

REFS = [{"ref_id": 5, "ann_id": 9, "category_id": 1, "image_id": 16,
         "file_name": "COCO_train2014_000000000016_0.jpg", "split": "val", "sent_ids": [1, 2],
         "sentences": [{"raw": "The Man", "sent": "the man", "sent_id": i, "tokens": ["the", "man"]}
                       for i in (1, 2)]}]
INSTANCES = {"images": [{"id": 16, "file_name": "COCO_train2014_000000000016.jpg",
                         "width": 400, "height": 300}],
             "annotations": [{"id": 9, "image_id": 16, "bbox": [10, 20, 100.5, 50],
                              "category_id": 1}],
             "categories": []}

def python2(value):
    """A pickle as Python 2 wrote it: its strings are bytes."""
    if isinstance(value, dict):
        return b"(d" + b"".join(python2(k) + python2(v) + b"s" for k, v in value.items())
    if isinstance(value, list):
        return b"(l" + b"".join(python2(v) + b"a" for v in value)
    return (f"I{value}" if isinstance(value, int) else f"S{value!r}").encode("latin1") + b"\n"

@pytest.mark.parametrize("content", [pickle.dumps(REFS, 2), python2(REFS) + b"."],
                         ids=["python 3", "python 2"])
def test_refcoco_pickle(folder, content):
    """Bug: the file name of the pickle, which exists nowhere; one row per object; width and height
    taken for a corner."""
    coco(folder), put(folder, "instances.json", INSTANCES)
    path = put(folder, "refs(unc).p", content)
    one, two = convert("refcoco", path)
    agree(one, dict(id="5_1", question="the man", answer_type="box",
                    targets=box(10, 20, 110.5, 70), category=["val"]))
    assert two.id == "5_2" and one.images[0].endswith("000016.jpg")
    with pytest.raises(data.DataError, match="holds no rows of category 'testA'"):
        converting.convert("refcoco", path, only="testA")
    for lacks, key in [("image", "images"), ("box", "annotations")]:
        put(folder, "instances.json", {**INSTANCES, key: []})
        with pytest.raises(data.DataError, match=f"ref 1: .*instances.json lacks its {lacks}"):
            converting.convert("refcoco", path)
    for bad in (5, [], {}, {**INSTANCES, "images": 5}, {**INSTANCES, "images": [5]},
                {**INSTANCES, "annotations": [{"id": []}]}):
        with pytest.raises(data.DataError, match="instances.json"):
            put(folder, "instances.json", bad), converting.convert("refcoco", path)

ran = []

class Evil:
    def __reduce__(self):
        return ran.append, ("a pickle ran code",)

class Plain:
    pass

@pytest.mark.parametrize("content, said", [
    (pickle.dumps([Evil()]), "asks for"),
    (pickle.dumps([Plain()]), "asks for"),
    (b"cos\nsystem\n(S'true'\ntR.", "asks for os.system"),
    (pickle.dumps([collections.OrderedDict()], 2), "asks for collections.OrderedDict"),
    (b"\x80\x02}q\x00.", "'refs' is {}; expected list"),
    (pickle.dumps(REFS)[:-9], "cannot read"),
    (b"", "cannot read"),
    (b"not a pickle", "cannot read"),
    (pickle.dumps([5]), "ref 1: field 'image_id'"),
])
def test_hostile_pickle(folder, content, said):
    """Bug: a downloaded pickle runs code. Nothing but plain containers, text and numbers is
    built."""
    put(folder, "instances.json", INSTANCES)
    path = put(folder, "refs(unc).p", content)
    with pytest.raises(data.DataError) as e:
        list(benchmarks.refcoco_rows(path, str(folder)))
    assert said in str(e.value) and path in str(e.value) and not ran

def test_folder_of_files(folder):
    """Bug: only the first of many files is read, or macOS' shadow of one."""
    row = ROWS["screenspot_pro"][0]
    for i in range(3):
        put(folder, f"pro/annotations/{i}.json", [{**row, "id": f"i{i}"}])
    put(folder, "pro/annotations/._0.json", b"\0\5\x16"), put(folder, f"pro/images/{A}", FILES[A])
    assert [s.id for s in convert("screenspot_pro", str(folder / "pro"),
                                  images=str(folder / "pro" / "images"))] == ["i0", "i1", "i2"]
    with pytest.raises(data.DataError,
                       match="sub holds no file that ends in .json, .jsonl, .parquet$"):
        converting.convert("screenspot_pro", str(folder / "sub"))

# -----------------------------------------------------------------------------
# MIG-Bench: which image?

MIG = [("region", "Here are a source image and its 3 parts. "
        "Locate the 2th region picture in the source image. ", "", 0),
       ("correspondence", "For the marked area in the first image, "
        "locate the matching one in the second image. ", "", 1),
       ("diff", "Compare these two images and locate what differs. ", "", 1),
       ("view_diff", "Locate the real difference in the second image. ", "", 1),
       ("refer_grounding", "Where is the object of image-1 in the image-2?", "", 1),
       ("group_grounding", "Find <|object_ref_start|>the first image of a cat<|object_ref_end|>.",
        "It is in the fourth image. <|box_start|>(1,2)<|box_end|>", 3),
       ("common_object", "These 4 images share an object. Locate it in the 3th image. ", "", 2),
       ("multi_view", "It is marked in the first image"
        "(<|box_start|>(451,265),(519,388)<|box_end|>). Locate it in the 2th image. ", "", 1),
       ("object_tracking", "For the object in the first image, locate it in the 4th image. ",
        "first image", 3),
       ("reasoning", "What in Image-2 belongs to image-1? "
        "Find it and locate it in the second image. ", "What in Image-3?", 1)]

@pytest.mark.parametrize("name, scale", [("mig_bench", 1), ("mig_bench_revised", 1000)])
def test_mig_images(folder, name, scale):
    """Bug: another image than the one that the task implies, silently."""
    images = [A, B, C, A]
    rows = [dict(task=task, images=images, question=question,
                 answer=[v * scale for v in (0.25, 0.5, 0.5, 1)],
                 additional_info=info, need_format=True)
            for task, question, info, _ in MIG]
    for s, (task, _, _, image) in zip(convert(name, put(folder, "mig.json", rows)), MIG,
                                      strict=True):
        w, h = SIZES[images[image]]
        quoted = ({"question_boxes": box(451 * 0.2, 265 * 0.1, 519 * 0.2, 388 * 0.1)}
                  if "box_start" in s.question else {})
        agree(s, dict(category=[task], targets=box(w / 4, h / 2, w / 2, h, image),
                      meta={"benchmark": name, **quoted}))
    assert ({task for task, *_ in MIG} == set(benchmarks.MIG)
            and sum(benchmarks.MIG.values()) == 4295)
    unnamed, = converting.convert(name, put(folder, "mig.json", [
        {**rows[6], "question": "Locate what these 2 images share."}]))[0]
    # marked, and counted by --check
    assert unnamed.targets[0]["image"] == 3 and unnamed.meta.get("image_unnamed")
    single, = converting.convert(name, put(folder, "mig.json", [
        {**rows[6], "question": "Locate the cup.", "images": [A]}]))[0]
    assert "image_unnamed" not in single.meta           # of one image there is nothing to guess

def test_boxes_in_a_question(folder):
    """Bug: a question quotes a box on 0-1000, and a model that reads pixels looks for it in another
    place; or in another image."""
    quote = "<|box_start|>({},{}),({},{})<|box_end|>".format
    row = dict(ROWS["univg-r1"][0],
               question=f"{quote(500, 200, 750, 400)} is in the first image, "
                        f"and in the second image{quote(0, 0, 100, 500)}. Where?")
    s, = convert("univg-r1", put(folder, "rl.json", [row]))
    assert s.meta["question_boxes"] == box(100, 20, 150, 40) + box(0, 0, 40, 150, 1)
    asked = "{} is in the first image, and in the second image{}. Where?".format
    pixels, thousand = ([(2, 1, 200, 100), (4, 5, 400, 300)],
                        [(0.2, 0.1, 200, 100), (0.4, 0.3, 400, 300)])
    assert data.question(s) == asked("(100, 20),(150, 40)", "(0, 0),(40, 150)")
    assert data.question(s, pixels) == asked("(50, 20),(75, 40)", "(0, 0),(10, 30)")
    assert (asked("(500, 200),(750, 400)", "(0, 0),(100, 500)")
            in data.prompt(s, "boxes", thousand)[1])
    assert (data.question(dataclasses.replace(s, meta={})) == s.question
            == row["question"].replace("<image>\n", ""))

def test_mig_inverted(folder, capsys):
    """Bug: the five published boxes that are inverted fail the file, go unnamed, or leave the
    denominator."""
    row = ROWS["mig_bench"][0]
    samples = convert("mig_bench", put(folder, "mig.json", [
        row, {**row, "answer": [0.5, 0.2, 0.1, 0.9]}]))
    out = capsys.readouterr().out
    assert (len(samples) == 2 and "1 of 2 gold answers would be scored as right" in out
            and "not mig_bench/1: its box" in out)
    assert "2 of 528 diff" in out and "by more than 4.8% of its side" in out
    assert rewards.score(samples[1], converting.gold_prediction(samples[1]), [],
                         "accuracy")["reward"] == 0

# -----------------------------------------------------------------------------
# what is wrong is said, in one line, and nothing is written

@pytest.mark.parametrize("name, values", [
    ("screenspot", [0.1, 0.2, 0.5, 0.7]), ("screenspot_v2", [0.1, 0.2, 1, 1]),
    ("screenspot_parquet", [10, 20, 30, 40]), ("screenspot_pro", [0, 0, 1, 1]),
    ("mig_bench", [100, 200, 500, 900]), ("mig_bench_revised", [0.1, 0.2, 0.5, 0.9]),
    ("univg-r1", [0.1, 0.2, 0.5, 0.9]), ("univg-r1", [0, 0, 1920, 1080]),
    ("lisa", [0.1, 0.2, 0.5, 0.9]), ("vlm-r1", [0.1, 0.2, 0.5, 0.9]),
    ("reasonvos", "0.1 0.2 0.5 0.9"), ("llmseg", [[0.1, 0.2], [0.5, 0.9]])])
def test_contradicted_layout(folder, name, values):
    """Bug: the file of another convention is read without a word. The layout is named, by the NAME;
    numbers only contradict it."""
    row = dict(ROWS.get(name, ROWS["screenspot"])[0])
    key = next(k for k in ("bbox", "answer", "boxes", "solution", "bbox_list") if k in row)
    row[key] = [values] * 3 if key == "bbox_list" else values
    path = put(folder, "rows.json", [row])
    with pytest.raises(data.DataError) as e:
        converting.convert(name, path)
    assert (str(e.value).startswith(f"{path}, record 1: {key} ")
            and f"cannot be {benchmarks.CONVERTERS[name].layout}; expected another file"
            in str(e.value))

def test_boxes_off_the_image(folder):
    """Bug: corners read as x, y, width, height (or the boxes of other images) pass the check."""
    good = ROWS["screenspot_v2"][0]
    samples, counts, _ = converting.convert("screenspot_v2", put(folder, "v2.json", [
        good, {**good, "bbox": [100, 50, 190, 90]}]))
    with pytest.raises(data.DataError, match="^1 faults, such as screenspot_v2/1: its box .* "
                                             "leaves its image, which is 200 x 100"):
        converting.check("screenspot_v2", samples, counts)

@pytest.mark.parametrize("case, change, fault", [
    ("lisa", {"boxes": [[30, 20, 10, 40]]}, "is inverted or empty"),
    ("screenspot", {"bbox": [-30, 2, 20, 9]}, "center of its box"),
    ("vstar jsonl", {"text": LETTERED.replace("three", "Two ")},
     "two of its options read the same"),
    ("vigorl web", {"answer": " "}, "is empty or holds a tag"),
    ("vigorl web", {"answer": "stop [</answer>]"}, "is empty or holds a tag"),
    ("robospatial", {"answer": "[(0.1, 0.1), (0.2, 0.2), (0.3, 0.3)]"},
     "its polygon has no area")])
def test_faults(folder, case, change, fault):
    """Bug: a row that nothing can answer passes the check unless it is one of the known ones."""
    name = case.split()[0]
    samples, counts, _ = converting.convert(
        name, put(folder, "rows.json", [{**ROWS[case][0], **change}]))
    with pytest.raises(data.DataError, match=fault):
        converting.check(name, samples, counts)

def test_impossible_is_what_scoring_says(folder):
    """Bug: --check calls a row right that rewards.score does not, or the other way round."""
    rng, seen = random.Random(0), collections.Counter()
    for _ in range(600):
        kind = rng.choice(["point", "box", "choice", "text", "polygon"])
        x, y = ([rng.choice([-40, -1, 0, 3, 50.123456]) for _ in "ab"],
                [rng.choice([-40, -1, 0, 3, 50.123456]) for _ in "ab"])
        targets = [{"image": 0, "box": [x[0], y[0], x[1], y[1]]}]
        if kind == "polygon":
            corners = [[rng.choice([0, 3, 9, 20]), rng.choice([0, 3, 9, 20])]
                       for _ in range(rng.randint(3, 5))]
            targets = data.parse_row(
                benchmarks.from_robospatial(
                    {"category": "context", "question": "?", "img": A,
                     "answer": str([(a / 20, b / 20) for a, b in corners])},
                    "", "") | {"meta": {}},
                "", str(folder)).targets
        words = [rng.choice(["a", "B.", "(C) c", "yes", "", " ", "<answer>", "x </answer> y",
                             "click [12]", ".", "type [1] [a [b]]"])
                 for _ in "abc"]
        s = data.Sample(
            "i", [A], "?", "point" if kind == "polygon" else kind,
            words if kind == "choice" else [],
            {"choice": rng.choice([0, 1, 2, None]), "text": rng.choice([words, []])}.get(kind),
            targets if kind in ("point", "box", "polygon") else [],
            meta=({"matcher": "web_action"}
                  if rng.random() < 0.5 and "answer>" not in words[0] else {}))
        hidden = kind in ("choice", "text") and s.answer in (None, [])
        right = (not hidden and rewards.score(s, converting.gold_prediction(s), [],
                                              "accuracy")["reward"] == 1)
        assert right == (not converting.why_unscorable(s)), (s, converting.why_unscorable(s))
        seen[kind, right] += 1
    assert len(seen) == 10 and min(seen.values()) >= 3, seen

BAD = [None, 5, -1, "", "x", [], {}, [5], ["x"], [[]], {"a": 1}, float("nan"), True, [None] * 4,
       "(1, 2)", [0.1] * 5]

@pytest.mark.parametrize("case", ROWS)
def test_bad_rows(case, folder):
    """Bug: a field that is missing or of another kind ends in a traceback, which names neither file
    nor row."""
    coco(folder)
    row, name, refused = ROWS[case][0], case.split()[0], set()
    for key in row:
        for value in ["(gone)", *BAD]:
            bad = {k: v for k, v in {**row, key: value}.items() if v != "(gone)"}
            path = put(folder, "bad.json", [row, bad])
            try:
                samples, counts, _ = converting.convert(name, path)
                assert len(samples) >= 2
            except data.DataError as e:
                assert str(e).startswith(f"{path}, record 2: ") and "\n" not in str(e), e
                refused.add(key)
    assert len(refused) >= 2, refused
    for odd in (5, None, [], "x"):
        with pytest.raises(data.DataError):
            converting.convert(name, put(folder, "bad.json", [row, odd]))

def test_no_pyarrow(folder, monkeypatch):
    """Bug: a parquet file without pyarrow ends in ModuleNotFoundError; a broken one in pyarrow's
    own errors."""
    path = put(folder, "x.parquet", b"PAR1 nonsense")
    if hasattr(sys.modules["pyarrow"], "Table"):
        with pytest.raises(data.DataError, match="cannot read .*x.parquet"):
            files.read_rows(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(data.DataError,
                       match="x.parquet is a parquet file; to read it: pip install pyarrow"):
        files.read_rows(path)

def run(monkeypatch, capsys, *args):
    monkeypatch.setattr("sys.argv", ["data.py", "convert", *map(str, args)])
    data.main()
    return capsys.readouterr().out

def test_command(folder, monkeypatch, capsys):
    """Bug: the command that --check prints does not score 100 %; what is missing is left out
    without a word."""
    good = ROWS["screenspot"][0]
    rows = [{**good, "img_filename": n, "instruction": f"no. {i}"}
            for i, n in enumerate([A, B, "gone.png", C])]
    path, out = (put(folder, "web.json", [{**r, "bbox": [10, 20, 30, 40]} for r in rows]),
                 folder / "new" / "out.jsonl")
    with pytest.raises(data.DataError,
                       match=f"{path}, record 3: image gone.png is not in {folder} "):
        run(monkeypatch, capsys, "screenspot", path, out, "--check")
    assert not (folder / "new").exists()
    said = run(monkeypatch, capsys, "screenspot", path, out, "--check", "--skip-missing")
    assert ("3 rows -> " in said
            and "coordinates read as xywh px; 1 rows left out for want of an image, "
                "such as gone.png" in said)
    assert "3 of 3 gold answers would be" in said and "3 images read" in said
    samples = data.read_jsonl(str(out))
    summary = evaluate.summary_of(predictions.from_predictions(
        samples, predictions.read_predictions(str(folder / "new" / "out.gold.jsonl"), samples)))
    assert (summary["n"], summary["correct"]) == (3, 3)
    with pytest.raises(data.DataError, match="holds no rows with its images in .*sub"):
        run(monkeypatch, capsys, "screenspot", path, out, "--skip-missing",
            "--images", folder / "sub" / "no")
    for source, bad in [(path, path), (path, folder), (folder, folder / "new" / "again.jsonl")]:
        with pytest.raises(data.DataError,
                           match=f"{bad} is a folder, or is part of what is converted"):
            run(monkeypatch, capsys, "screenspot", source, bad, "--skip-missing")

def test_nothing_half_written(folder, monkeypatch, capsys):
    """Bug: a fault in the last row leaves the first ones behind; a truncated image passes the
    check."""
    row = ROWS["screenspot"][0]
    for rows, expected in [
            ([row, {**row, "bbox": [1, 2, 3]}], "record 2: bbox"),
            ([row, {**row, "img_filename": "half.png"}], "half.png cannot be read")]:
        put(folder, "half.png", FILES[A][:-30])
        with pytest.raises(data.DataError, match=expected):
            run(monkeypatch, capsys, "screenspot", put(folder, "w.json", rows),
                folder / "new" / "out.jsonl", "--check")
        assert not (folder / "new").exists()
    monkeypatch.setattr(json, "dumps", lambda row: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        data.write_jsonl(str(folder / "out.jsonl"), data.toy("point", "train", 1))
    assert not [f for f in os.listdir(folder) if f.startswith("out.jsonl")]

def test_counts_and_first_options(folder, capsys):
    """Bug: half of a file passes for the whole; a benchmark whose gold is always option A is asked
    in that order."""
    row = {**ROWS["sat json"][0], "correct_answer": "left"}
    convert("sat", put(folder, "sat.json", [row] * 150))
    out = capsys.readouterr().out
    assert ("whole file" not in out and "always the first option" in out
            and "150 of 150 gold answers" in out)
    convert("screenspot", put(folder, "web.json", [ROWS["screenspot"][0]]))
    assert ("not the whole file: 1 of 1272 rows (0 of 502 mobile, 0 of 334 desktop, 0 of 436 web)\n"
            in capsys.readouterr().out)
    convert("sat", put(folder, "sat.json", [row] * 11 + [{**row, "correct_answer": "right"}]))
    out = capsys.readouterr().out
    assert "12 of 150 or 4000 or 4001 rows" in out and "always the first" not in out

@pytest.mark.parametrize("case, key", [
    ("vlm-r1", "solution"), ("vlm-r1", "problem"), ("vlm-r1", "image"),
    ("lisa", "boxes"), ("lisa", "instruction"), ("lisa", "image_path"),
    ("llmseg", "bbox"), ("llmseg", "question"),
    ("screenspot", "img_filename"), ("screenspot", "bbox"), ("screenspot_pro", "img_filename"),
    ("robospatial yes", "img"), ("vigorl eval", "image"), ("vigorl eval", "conversations"),
    ("vstar jsonl", "text"), ("mig_bench", "answer"), ("univg-r1", "images")])
def test_a_missing_field_has_the_name_of_its_layout(folder, case, key):
    """Bug: a file of VLM-R1 that lacks "solution" is told to have no "bbox"; one without its image,
    no "images"."""
    row = {k: v for k, v in ROWS[case][0].items() if k != key}
    with pytest.raises(data.DataError, match=f"rows.json, record 1: field '{key}' is missing"):
        converting.convert(case.split()[0], put(folder, "rows.json", [row]))

def test_a_missing_image_of_blink_and_sat(folder):
    blink = {"idx": "val_Jigsaw_1",
             "prompt": "Which?\nSelect from the following choices.\n(A) 1\n(B) 2",
             "choices": ["1", "2"], "answer": "(B)"}
    sat = {k: v for k, v in ROWS["sat json"][0].items() if k != "img_paths"}
    for name, row, key in (("blink", blink, "image_1"), ("sat", sat, "images")):
        with pytest.raises(data.DataError, match=f"record 1: field '{key}' is missing"):
            converting.convert(name, put(folder, "rows.json", [row]))

def screens(**numbers):
    """A file of ScreenSpot with so many rows of each platform."""
    row = ROWS["screenspot"][0]
    return [{**row, "img_filename": f"{kind}_{A}"} for kind, n in numbers.items() for _ in range(n)]

def test_only_one_category(folder, capsys):
    """Bug: the categories that nobody asked for are called missing; a category that does not exist
    leaves the reader without a hint."""
    for kind in ("pc", "mobile", "web"):
        put(folder, f"{kind}_{A}", FILES[A])
    path = put(folder, "s.json", screens(web=436, pc=3))
    checked = lambda name, path, only="": converting.check(
        name, *converting.convert(name, path, only=only)[:2], only)
    checked("screenspot", path, "web")
    assert "whole file" not in capsys.readouterr().out
    checked("screenspot", path, "desktop")
    assert "not the whole file: 3 of 334 desktop\n" in capsys.readouterr().out
    checked("screenspot", path, "icon")         # not published by kind: nothing to compare
    assert "whole file" not in capsys.readouterr().out
    with pytest.raises(data.DataError, match="holds no rows of category 'icn'; "
                                             "its categories: web, icon, desktop$"):
        converting.convert("screenspot", path, only="icn")

def test_blink_counts_its_val_split(folder, capsys):
    """Bug: rows of the test split, which is published too, make up for missing ones of val."""
    row = lambda split, i: {
        "idx": f"{split}_Counting_{i}", "prompt": "?\nSelect from the following choices.\n",
        "choices": ["a", "b"], "answer": "(A)", "image_1": A}
    path = put(folder, "b.json",
               [row("val", i) for i in range(100)] + [row("test", i) for i in range(20)])
    for only in ("", "val"):
        samples, counts, _ = converting.convert("blink", path, only=only)
        converting.check("blink", samples, counts, only)
        assert ("not the whole file: 100 of 1901 rows (0 of 117 Art_Style, 100 of 120 Counting, "
                in capsys.readouterr().out)

def test_the_two_screenspots_are_told_apart(folder, capsys):
    """Claim: 501, 334 and 437 rows are those of the second version, 502, 334 and 436 those of the
    first."""
    for kind in ("pc", "mobile", "web"):
        put(folder, f"{kind}_{A}", FILES[A])
    versions = {"screenspot": dict(mobile=502, pc=334, web=436),
                "screenspot_v2": dict(mobile=501, pc=334, web=437)}
    for name in versions:
        for made, numbers in versions.items():
            for part in (numbers, {"web": numbers["web"]}):
                samples, counts, _ = converting.convert(
                    name, put(folder, "s.json", screens(**part)))
                converting.check(name, samples, counts)
                out = capsys.readouterr().out
                assert (f"the numbers of rows are those of {made}, not of {name}: is NAME right?"
                        in out) == (name != made)
                assert ("not the whole file" in out) == (name == made and len(part) == 1)

def test_files_of_a_folder_are_named_and_chosen(folder, monkeypatch, capsys):
    """Bug: a folder's other files (another version, results) are converted too, without a word."""
    row = ROWS["screenspot"][0]
    for name in ("web.json", "sub2/web_v2.json"):
        put(folder, f"f/{name}", [{**row, "instruction": name}])
    put(folder, f"f/{A}", FILES[A])
    run(monkeypatch, capsys, "screenspot", folder / "f" / "web.json", folder / "o.jsonl")
    said = run(monkeypatch, capsys, "screenspot", folder / "f", folder / "o.jsonl")
    assert (f"files read from {folder}/f (--files chooses): web.json, sub2/web_v2.json\n2 rows"
            in said)
    for pattern, taken in (("*_v2.json", "sub2/web_v2.json"), ("sub2/*", "sub2/web_v2.json"),
                           ("web.json", "web.json")):
        said = run(monkeypatch, capsys, "screenspot", folder / "f", folder / "o.jsonl",
                   "--files", pattern)
        assert (f"(--files chooses): {taken}\n1 rows" in said
                and data.read_jsonl(str(folder / "o.jsonl"))[0].question == taken)
    with pytest.raises(data.DataError, match="no file of .* matches --files 'x'; "
                                             "it has web.json, sub2/web_v2.json"):
        run(monkeypatch, capsys, "screenspot", folder / "f", folder / "o.jsonl", "--files", "x")
    with pytest.raises(data.DataError, match="--files chooses among the files of a folder; "
                                             ".*web.json is read as it is"):
        run(monkeypatch, capsys, "screenspot", folder / "f" / "web.json", folder / "o.jsonl",
            "--files", "x")

@pytest.mark.parametrize("box", [[10, 20, 60, 50], [0.1, 0.2, 0.5, 1.2], [-0.2, 0, 1, 1]])
def test_a_norm_box_is_on_0_to_1(folder, box):
    """Bug: pixels under "norm_box" are multiplied by the size of the image once more."""
    row = {"images": [A], "question": "?", "answer_type": "point",
           "targets": [{"image": 0, "norm_box": box}]}
    with pytest.raises(data.DataError, match="o.jsonl, line 1: norm_box is .*; "
                                             "expected shares of the image's sides, 0 to 1"):
        data.read_jsonl(put(folder, "o.jsonl", json.dumps(row)))

def test_a_full_disk_leaves_no_temporary_file(folder, monkeypatch, capsys):
    """Bug: a conversion that finds the disk full leaves out.jsonl.tmp behind."""
    path = put(folder, "web.json", [ROWS["screenspot"][0]])
    def full(*_):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "replace", full)
        run(patch, capsys, "screenspot", path, folder / "new" / "out.jsonl")
    assert os.listdir(folder / "new") == []

def test_known_numbers():
    """Bug: a slip in the published counts."""
    total = lambda name: sum(benchmarks.CONVERTERS[name].published.values())
    assert {n: total(n) for n in ("vstar", "blink", "robospatial", "screenspot", "screenspot_v2",
                                  "screenspot_pro", "mig_bench", "mig_bench_revised")} == {
        "vstar": 191, "blink": 1901, "robospatial": 350, "screenspot": 1272, "screenspot_v2": 1272,
        "screenspot_pro": 1581, "mig_bench": 4295, "mig_bench_revised": 4276}

# -----------------------------------------------------------------------------
# do the tests bite? Each row puts one bug into a reader, the check or rewards.py; the named test
# must fail.

def converter(read, to_row, layout, more=""):
    return f"Converter({read}, {to_row}, '{layout}'{more})"

MUTATIONS = [
    ("appendix.benchmarks:box_target", "corners = [a, b, a + c, b + d]",
     "corners = [a, b, c, d]", test_row, dict(case="screenspot")),
    ("appendix.benchmarks:CONVERTERS",
     converter("published_rows", "from_screenspot", "xywh px", ", SCREENSPOT_V2"),
     converter("published_rows", "from_screenspot", "xyxy px", ", SCREENSPOT_V2"),
     test_row, dict(case="screenspot_v2")),
    ("appendix.benchmarks:CONVERTERS",
     converter("published_rows", "from_screenspot", "xyxy 0-1", ", SCREENSPOT"),
     converter("published_rows", "from_screenspot", "xywh 0-1", ", SCREENSPOT"),
     test_screenspot_parquet, {}),
    ("appendix.benchmarks:box_target", "not low < max(a, b, c, d) <= high",
     "False", test_contradicted_layout, dict(name="lisa", values=[0.1, 0.2, 0.5, 0.9])),
    ("appendix.benchmarks:box_target", "not low < max(a, b, c, d) <= high",
     "max(a, b, c, d) > high", test_contradicted_layout,
     dict(name="screenspot", values=[0.1, 0.2, 0.5, 0.7])),
    ("appendix.benchmarks:clamp", "min(max(v, 0), high)",
     "v", test_row, dict(case="screenspot_pro")),
    ("appendix.benchmarks:vstar_rows", "{**known, **row}",
     "known", test_row, dict(case="vstar jsonl")),
    ("appendix.benchmarks:vstar_rows", "'relative_position'", "'OCR'", test_vstar_folder, {}),
    ("appendix.benchmarks:from_blink", "(1, 2, 3, 4)", "(1, 2)", test_blink_parquet, {}),
    ("appendix.benchmarks:from_blink", "row.get('answer') not in (None, '', 'hidden')",
     "True", test_blink_parquet, {}),
    ("appendix.benchmarks:clean_sat_option",
     "str(option).replace(' in the first frame', '').strip()",
     "str(option).strip()", test_row, dict(case="sat json")),
    ("appendix.benchmarks:from_sat", "kind == 'ego_movement'",
     "False", test_sat_parquet, dict(key="images")),
    ("appendix.convert:unwrap", "image.get('bytes') or image.get('path')",
     "image.get('path') or image.get('bytes')", test_sat_parquet, dict(key="images")),
    ("appendix.benchmarks:in_order", "corners[np.arctan2(dy, dx).argsort()]",
     "corners", test_robospatial_place, {}),
    ("appendix.benchmarks:from_robospatial",
     r"r'\s+(?:Answer yes or no|Your answer should be formatted)'",
     r"r'(?!)'", test_row, dict(case="robospatial yes")),
    ("appendix.benchmarks:frame_files", "(int(number[0]), name)",
     "(name, name)", test_revos, {}),
    ("appendix.benchmarks:frame_files", "number and not name.startswith('.')",
     "number", test_revos, {}),
    ("appendix.benchmarks:from_video", "box_target(box, 'bbox_list', layout, where, image=2)",
     "box_target(box, 'bbox_list', layout, where, image=0)", test_row, dict(case="reasonvos")),
    ("appendix.benchmarks:from_video", r"r'-?\d+(?:\.\d+)?'",
     r"r'\d+'", test_row, dict(case="reasonvos")),
    ("appendix.benchmarks:PlainUnpickler.find_class",
     "raise DataError(f'it asks for {module}.{name}; "
     "expected nothing but lists, dicts, strings and numbers')",
     "return pickle.Unpickler.find_class(self, module, name)", test_hostile_pickle,
     dict(content=pickle.dumps([collections.OrderedDict()], 2), said="asks for")),
    ("appendix.benchmarks:refcoco_rows", "image.get('file_name')",
     "ref.get('file_name')", test_refcoco_pickle, dict(content=python2(REFS) + b".")),
    ("appendix.benchmarks:load_plain_pickle", "'latin1'",
     "'bytes'", test_refcoco_pickle, dict(content=python2(REFS) + b".")),
    ("appendix.benchmarks:refcoco_parquet_rows", "row.get('image') or coco_name",
     "row.get('image') or file", test_row, dict(case="refcoco_parquet")),
    ("appendix.benchmarks:IMPLIED_IMAGE",
     "{'region': 0, 'correspondence': 1, 'diff': 1, 'view_diff': 1, 'refer_grounding': 1}",
     "{'region': 0, 'correspondence': 1, 'diff': 1, 'view_diff': 0, 'refer_grounding': 1}",
     test_mig_images, dict(name="mig_bench", scale=1)),
    ("appendix.benchmarks:from_univg", "task == 'group_grounding'",
     "False", test_mig_images, dict(name="mig_bench", scale=1)),
    ("appendix.benchmarks:asked_image", "reversed(IMAGE_NAME.findall(text.lower()))",
     "IMAGE_NAME.findall(text.lower())", test_mig_images,
     dict(name="mig_bench_revised", scale=1000)),
    ("appendix.benchmarks:IMAGE_NAME", r"r'(\d+)(?:st|nd|rd|th)? image\b|image[ -](\d+)|('",
     r"r'(\d+)(?:st|nd|rd|th)? image|image[ -](\d+)|('",
     test_mig_images, dict(name="mig_bench", scale=1)),
    ("appendix.benchmarks:quoted_boxes", "asked_image(question[:quote.start()], n) or 0",
     "0", test_boxes_in_a_question, {}),
    ("appendix.benchmarks:quoted_boxes",
     "{'image': image, 'norm_box': [int(v) / 1000 for v in quote.groups()]}",
     "{'image': image, 'box': [int(v) for v in quote.groups()]}", test_boxes_in_a_question, {}),
    ("data:question", "frames[place['image']][:2] if frames else (1, 1)",
     "(1, 1)", test_boxes_in_a_question, {}),
    ("data:prompt", "question(sample, frames)",
     "sample.question", test_boxes_in_a_question, {}),
    ("appendix.benchmarks:from_univg", "len(paths) > 1",
     "True", test_mig_images, dict(name="mig_bench", scale=1)),
    ("appendix.benchmarks:from_univg", "meta['image_unnamed'] = True",
     "pass", test_mig_images, dict(name="mig_bench", scale=1)),
    ("appendix.benchmarks:from_univg", "not (x1 < x2 and y1 < y2)",
     "False", test_mig_inverted, {}),
    ("appendix.faults:faults_of", "overhang(target['box'], (width, height)) > 0.05",
     "False", test_boxes_off_the_image, {}),
    ("appendix.convert:check", "'published_wrong' not in s.meta", "False", test_faults,
     dict(case="lisa", change={"boxes": [[30, 20, 10, 40]]}, fault="inverted")),
    ("appendix.faults:why_bad_box", "x1 < x2 and y1 < y2",
     "x1 <= x2 and y1 < y2", test_impossible_is_what_scoring_says, {}),
    ("appendix.faults:why_bad_place", "x1 + x2 < 0 or y1 + y2 < 0",
     "False", test_impossible_is_what_scoring_says, {}),
    ("appendix.faults:why_unscorable", "not gold.strip() or 'answer>' in gold",
     "not gold.strip()", test_impossible_is_what_scoring_says, {}),
    ("appendix.convert:convert", "str(row['id']) in taken",
     "False", test_whole_range_of_ids, {}),
    ("appendix.convert:convert", "row.get('id') is None",
     "not row.get('id')", test_whole_range_of_ids, {}),
    ("appendix.convert:convert", "not skip_missing", "False", test_command, {}),
    ("appendix.data_commands:run_convert",
     "if args.check:\n    convert.check(args.name, samples, counts, args.only)",
     "data.write_jsonl(args.out, samples)\n"
     "if args.check:\n    convert.check(args.name, samples, counts, args.only)",
     test_nothing_half_written, {}),
    ("appendix.convert:print_incomplete", "counts[category] not in possible",
     "False", test_counts_and_first_options, {}),
    ("appendix.files:parquet_rows",
     "raise DataError(f'{path} is a parquet file; to read it: pip install pyarrow') from None",
     "return []", test_no_pyarrow, {}),
    ("appendix.benchmarks:used_key", "keys[0]",
     "keys[-1]", test_a_missing_field_has_the_name_of_its_layout,
     dict(case="vlm-r1", key="problem")),
    ("appendix.benchmarks:image_under", "isinstance(image, (str, bytes, dict))",
     "True", test_a_missing_field_has_the_name_of_its_layout, dict(case="vlm-r1", key="image")),
    ("appendix.convert:print_incomplete", "only and only != converter.split",
     "False", test_only_one_category, {}),
    ("appendix.convert:convert", "not converter.split or converter.split in row['category']",
     "True", test_blink_counts_its_val_split, {}),
    ("appendix.convert:same_numbers",
     "(converter.to_row, converter.layout) != (own.to_row, own.layout)",
     "True", test_the_two_screenspots_are_told_apart, {}),
    ("appendix.convert:files_of", "not pattern",
     "True", test_files_of_a_folder_are_named_and_chosen, {}),
    ("appendix.rows:read_shares", "-0.05 <= min(shares) <= max(shares) <= 1.05",
     "min(shares) <= 1.05", test_a_norm_box_is_on_0_to_1, dict(box=[0.1, 0.2, 0.5, 1.2])),
    ("appendix.convert:files_of", "name.endswith(endings) and not name.startswith('.')",
     "name.endswith(endings)", test_folder_of_files, {}),
    ("appendix.convert:published_rows",
     "for name in names:\n    yield from converter.read(os.path.join(path, name), root)",
     "for name in names[:1]:\n    yield from converter.read(os.path.join(path, name), root)",
     test_folder_of_files, {}),
    ("appendix.rows:write_image", r"{b'\xff\xd8': 'jpg', b'\x89P': 'png'}",
     r"{b'\xff\xd8': 'jpg', b'\x89P': 'png', b'RI': 'png'}", test_webp_in_parquet, {}),
    ("appendix.benchmarks:box_target", "corners = [v / 1000 for v in corners]",
     "pass", test_row, dict(case="univg-r1")),
    ("rewards:point_in_target",
     "'polygon' in target and not in_polygon(x, y, target['polygon'])",
     "False", test_robospatial_place, {}),
    ("rewards:in_polygon", "(y1 > y) != (y2 > y)",
     "(y1 > y) != (y2 > x)", test_robospatial_place, {}),
]

@pytest.mark.parametrize("target, old, new, test, arguments", MUTATIONS, ids=names(MUTATIONS))
def test_mutations(target, old, new, test, arguments, folder, monkeypatch, capsys):
    """Bug: a test that no bug can turn red."""
    check_mutation(target, old, new, test, arguments,
                   {"folder": lambda: folder, "monkeypatch": lambda: monkeypatch,
                    "capsys": lambda: capsys})
