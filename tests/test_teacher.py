"""
Traces from a teacher: which chains are kept, what the teacher is sent, an endpoint that misbehaves.
At the end MUTATIONS puts bugs into the code, one at a time, and requires the named test to fail.
"""
import itertools, re

import pytest

import data, train_sft
from appendix import teacher
from conftest import Server, check_mutation, close, names

ASKED = data.toy("search", "train", 2, "search tests")
RIGHT = ASKED[0].options[ASKED[0].answer]
WRONG = next(o for o in ASKED[0].options if o != RIGHT)

def think(thought, answer):
    return f"<think> {thought} </think>\n<answer> {answer} </answer>"

def test_read_reply():
    """Claim: a chain is kept if it can be parsed, ends in the gold and does not say that it was
    told; words may be as they like."""
    s = ASKED[0]
    read = lambda text: teacher.read_reply(text, s, None)
    assert (read("Sure!\n" + think("The square at (10, 20)\nis lined.", RIGHT.upper()))
            == ("The square at (10, 20) is lined.", RIGHT.upper(), ""))
    for text in ("", RIGHT, "<think> x </think>", think("", RIGHT), think("x", ""),
                 f"<answer> {RIGHT} </answer>"):
        assert read(text).fault == "unparsed", text
    assert read(think("At (10, 20).", WRONG)).fault == "wrong"
    for leak in ("It fits the given bounding box (1, 2).", "The ground truth says so.",
                 "The provided answer is at (1, 2).", "I was told.", "The ground-truth box."):
        assert read(think(leak, RIGHT)).fault == "leaked", leak
    assert read(think("Given the light, the square at (10, 20) stands on the target board.",
                      RIGHT)).fault == ""

def test_steps_of():
    """Claim: a sentence that names a point ends a step; sentences without one belong to the next;
    what is left has no point."""
    assert teacher.steps_of(
        "I look. The sign is at (10, 20), left. It is 3.5 m tall. Then (40, 50)! So it is.") == [
            ("I look. The sign is at (10, 20), left.", (10, 20)),
            ("It is 3.5 m tall. Then (40, 50)!", (40, 50)),
            ("So it is.", None)]
    assert teacher.steps_of("Nothing.") == [("Nothing.", None)]

def test_gold_is_in_the_policys_own_coordinates(models):
    s = data.toy("boxes", "train", 1, "gold")[0]
    views = teacher.prompt_views(models["qwen2.5"], s)
    numbers = [int(v) for v in re.findall(r"\d+", teacher.answer_to_show(s, views))]
    close(numbers, [v / 4 for v in s.targets[0]["box"]], 0.02)          # 448 pixels fed as 112
    assert teacher.answer_to_show(ASKED[0], None) == RIGHT
    with pytest.raises(data.DataError, match="no answer"):
        teacher.answer_to_show(data.Sample("h", [], "?", "text"), None)

class Teacher:
    """Every chain is right and names another place; the judge likes the second of those shown."""
    def __init__(self):
        self.places, self.liked = itertools.count(10), []

    def __call__(self, text):
        if "chains of reasoning" in text:
            self.liked.append(re.findall(r"is at \((\d+), 20\)", text)[1])
            return "2."
        right = re.search(r"The answer is (\w+)\.", text)[1]
        return think(f"The thing is at ({next(self.places)}, 20). It is {right}.", right)

def config(url, **more):
    return train_sft.Config(**{
        **dict(traces="teacher", teacher=url, chains=2, timeout=0.5, retries=3), **more})

def test_teacher_traces(models, tmp_path):
    """Claim: k chains for each question, sent with its image and gold; the judge's choice becomes
    the trace; every reply is kept, and a second run asks nothing."""
    vlm, log = models["qwen2.5"], str(tmp_path / "replies.jsonl")
    the_teacher = Teacher()
    with Server(the_teacher) as server:
        found, counts = teacher.teacher_traces(vlm, config(server.url), "zoom", ASKED, log=log)
        assert (counts == {"questions": 2, "chains": 4, "unparsed": 0, "wrong": 0, "leaked": 0}
                and len(server.asked) == 6)
        assert [t.sample.id for t in found] == [s.id for s in ASKED]
        turns = found[0].turns
        assert len(turns) == 2 and turns[1] == think(f"It is {RIGHT}.", RIGHT)
        # questions are judged at the same time, in any order
        assert (sorted(re.search(r"\[(\d+), 20\]", trace.turns[0])[1] for trace in found)
                == sorted(the_teacher.liked))
        body = server.asked[0]
        assert (body["model"] == "big-model"
                and body["messages"][0]["content"][0]["image_url"]["url"].startswith(
                    "data:image/png;base64,"))
        assert "x from 0 to 112" in body["messages"][0]["content"][1]["text"]
        assert [b["temperature"] for b in server.asked] == [1.0] * 4 + [0.0] * 2
        with open(log, "a") as f:
            f.write('{"key": "torn')
        again, _ = teacher.teacher_traces(vlm, config(server.url), "zoom", ASKED, log=log)
        assert [t.turns for t in again] == [t.turns for t in found] and len(server.asked) == 6

def test_the_filters_count_what_they_drop(models):
    replies = iter([think("At (3, 4).", WRONG), "hm",
                    think("As in the given answer, (3, 4).", RIGHT), think("At (3, 4).", RIGHT)])
    with Server(lambda text: next(replies)) as server:
        found, counts = teacher.teacher_traces(models["qwen2.5"], config(server.url, chains=4),
                                               "think", ASKED[:1])
    assert (counts == {"questions": 1, "chains": 4, "unparsed": 1, "wrong": 1, "leaked": 1}
            and found[0].turns == [think("At (3, 4).", RIGHT)])
    with (Server(lambda text: "hm") as server,
          pytest.raises(data.DataError, match="no chain .* of 4, 4 unparsed")):
        teacher.teacher_traces(models["qwen2.5"], config(server.url), "think", ASKED)

def test_numbers_without_end_are_no_crash(models):
    """Bug: a number of 309 digits in a chain, or of 5,000 in a verdict, ended the run; and the
    reply was kept, so it did for ever."""
    huge = think(f"At ({'9' * 400}, 4). At (3, 4).", RIGHT)
    with Server(lambda text: "9" * 5000 if "chains of reasoning" in text else huge) as server:
        found, _ = teacher.teacher_traces(models["qwen2.5"], config(server.url, chains=2),
                                          "zoom", ASKED[:1])
    assert len(found) == 1 and "[3, 4]" in found[0].turns[0]

@pytest.mark.parametrize("fault", [
    "late", 500, 503, 429, "cut", "not json", "no choices", "no text"])
def test_what_may_pass_is_tried_again(models, hurry, fault):
    """Claim: a server that fails at first and then answers costs time, no reply."""
    with Server(Teacher(), lambda n: fault if n == 1 else None) as server:
        found, _ = teacher.teacher_traces(models["qwen2.5"], config(server.url, chains=1),
                                          "think", ASKED[:1])
        assert len(server.asked) == 2 and len(found) == 1

@pytest.mark.parametrize("fault, tries, said", [
    (500, 4, "HTTP 500"), (401, 1, "HTTP 401"), (404, 1, "HTTP 404"),
    ("not json", 4, "not what was asked for"), ("cut", 4, "tried 4 times")])
def test_what_will_not_pass_ends_in_one_line(models, hurry, fault, tries, said):
    """Claim: retries are bounded, and a refusal (a wrong key) is not tried again; one line says
    which address and what it said."""
    with (Server(Teacher(), lambda n: fault) as server,
          pytest.raises(data.DataError) as error):
        teacher.teacher_traces(models["qwen2.5"], config(server.url, chains=1), "think", ASKED[:1])
    assert (len(server.asked) == tries and said in str(error.value)
            and server.url in str(error.value) and "\n" not in str(error.value))
    with pytest.raises(data.DataError, match="127.0.0.1:9/v1/models"):      # nobody listens there
        teacher.teacher_traces(models["qwen2.5"], config("http://127.0.0.1:9/v1"), "think",
                               ASKED[:1])

def test_nothing_paid_for_is_lost(models, tmp_path, hurry):
    """Claim: when the server dies half way, the replies it gave are not asked for again."""
    vlm, log = models["qwen2.5"], str(tmp_path / "replies.jsonl")
    with (Server(Teacher(), lambda n: 401 if n > 2 else None) as server,
          pytest.raises(data.DataError)):
        teacher.teacher_traces(vlm, config(server.url), "think", ASKED, log=log)
    with open(log) as f:
        assert len(f.readlines()) == 2
    with Server(Teacher()) as server:
        found, _ = teacher.teacher_traces(vlm, config(server.url), "think", ASKED, log=log)
        # the other two chains, and the judge twice
        assert len(found) == 2 and len(server.asked) == 2 + 2

def test_a_local_teacher(models):
    """Claim: without an address the policy itself is asked; a random one writes nothing that can be
    used, which is said, not trained on."""
    with pytest.raises(data.DataError, match="no chain .* of 2"):
        teacher.teacher_traces(models["qwen2.5"], train_sft.Config(chains=1, teacher_tokens=4),
                               "think", ASKED)

# -----------------------------------------------------------------------------
# mutations

MUTATIONS = [  # where, old code, new code, the test that must fail, its arguments
    ("appendix.teacher:read_reply", "LEAK.search(thought)", "False", test_read_reply, {}),
    ("appendix.endpoint:Endpoint.reply_to", "key not in self.replies",
     "True", test_teacher_traces, {}),
    ("appendix.endpoint:Endpoint.request", "range(self.retries + 1)",
     "range(self.retries + 9)", test_what_will_not_pass_ends_in_one_line,
     dict(fault=500, tries=4, said="HTTP 500")),
    ("appendix.endpoint:Endpoint.request", "e.code not in MAY_PASS and e.code < 500",
     "False", test_what_will_not_pass_ends_in_one_line,
     dict(fault=401, tries=1, said="HTTP 401")),
]

@pytest.mark.parametrize("target, old, new, test, arguments", MUTATIONS, ids=names(MUTATIONS))
def test_mutations(target, old, new, test, arguments, models, tmp_path_factory, hurry):
    """Bug: a test that no bug can turn red."""
    check_mutation(target, old, new, test, arguments, {
        "models": lambda: models, "tmp_path": lambda: tmp_path_factory.mktemp("mutant"),
        "hurry": lambda: None})
