"""A model behind an address: a client for OpenAI-compatible servers (vLLM, SGLang, a paid service).

    teacher = Endpoint("http://127.0.0.1:8000/v1", log="replies.jsonl")
    replies = teacher.ask([("question 1", views, "What is in the image?")], temperature=1.0)

Replies cost money. Each one is written to the log when it arrives and is never asked for again,
and a request that failed is repeated only where that can help. The key comes from the environment
variable OPENAI_API_KEY.
"""
import base64
import contextlib
import http.client
import io
import json
import os
import threading
import time
import urllib.error
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from appendix import run
from appendix.files import DataError

MAX_REPLY_BYTES = 1 << 24
# Client errors that may pass: time-out, conflict, too many requests. The others, such as 401 (wrong
# key), are final; server errors (500 and above) may always pass.
MAY_PASS = (408, 409, 429)


class Endpoint:
    """An OpenAI-compatible server. A request that fails for good raises DataError.

    url: address up to and including /v1       model: name of the server's model; empty: its first
    log: JSONL file of the replies, or empty   max_tokens: tokens of a reply, at most
    timeout: seconds that a reply may take     retries: further attempts after a failed one
    """

    def __init__(self, url, model="", log="", max_tokens=1024, timeout=120.0, retries=4):
        self.url = url.rstrip("/")
        self.log = log
        self.max_tokens = max_tokens
        self.timeout = timeout
        self.retries = retries
        self.lock = threading.Lock()
        self.replies = read_log(log)                    # {key: text}
        self.model = model or self.request("/models", name_of_first_model)

    def ask(self, jobs, temperature, workers=8):
        """[(key, views, text)] -> the replies, in the order of the jobs.

        A job is one user message: the images of its views, then its text. Its key and text decide
        which logged reply belongs to it. The first request that fails for good stops all.
        """
        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(self.reply_to, *job, temperature) for job in jobs]
            try:
                bar = tqdm(futures, desc="teacher", unit=" replies", disable=None)
                return [future.result() for future in bar]
            except BaseException:
                # Requests under way are paid for: wait for their replies, which are logged.
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def reply_to(self, key, views, text, temperature):
        """The reply to one message, from the log or from the server."""
        key = f"{self.model}/{key}/{zlib.crc32(text.encode()):08x}"
        if key not in self.replies:
            content = []
            for view in views:
                content.append({"type": "image_url", "image_url": {"url": png(view.pixels())}})
            content.append({"type": "text", "text": text})
            reply = self.request("/chat/completions", text_of_reply, {
                "model": self.model,
                "messages": [{"role": "user", "content": content}],
                "temperature": temperature,
                "max_tokens": self.max_tokens,
            })
            with self.lock:
                self.replies[key] = reply
                if self.log:
                    run.append_rows(self.log, [{"key": key, "text": reply}])
        return self.replies[key]

    def request(self, path, read, body=None):
        """Send one request -> read(the JSON of the reply).

        Repeats, after longer and longer pauses, what may pass: no connection, time-outs, the
        statuses of MAY_PASS, 5xx, replies that are cut off or are no JSON of the right shape.
        """
        for attempt in range(self.retries + 1):
            if attempt > 0:
                time.sleep(min(0.5 * 2 ** attempt, 20))
            try:
                return read(self.send(path, body))
            except urllib.error.HTTPError as e:
                fault = f"HTTP {e.code} {e.reason}"
                with contextlib.suppress(OSError, http.client.HTTPException):
                    fault += ": " + e.read(300).decode(errors="replace")
                if e.code not in MAY_PASS and e.code < 500:
                    break
            except (OSError, http.client.HTTPException) as e:   # refused, reset, timed out, cut off
                fault = f"{type(e).__name__}: {e}"
            except (ValueError, KeyError, IndexError, TypeError) as e:
                fault = f"a reply that is not what was asked for ({type(e).__name__}: {e})"
        fault = " ".join(fault.split())[:300]
        raise DataError(f"teacher at {self.url}{path}: {fault} "
                        f"(tried {attempt + 1} times; replies so far are kept)")

    def send(self, path, body):
        """POST body as JSON, or GET if there is none -> the JSON of the reply."""
        headers = {"Content-Type": "application/json",
                   "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}"}
        payload = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, payload, headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as reply:
            return json.loads(reply.read(MAX_REPLY_BYTES))


def read_log(path):
    """The replies of earlier runs, {key: text}. A last line torn by a kill is cut off."""
    if not path or not os.path.exists(path):
        return {}
    run.cut_torn_line(path)
    replies = {}
    try:
        with open(path, encoding="utf-8") as f:
            for line in f:
                row = json.loads(line)
                replies[row["key"]] = row["text"]
    except (ValueError, KeyError, TypeError) as e:
        raise DataError(f"{path} holds a line that is no logged reply "
                        f"({type(e).__name__}: {e})") from None
    return replies


def name_of_first_model(reply):
    return reply["data"][0]["id"]


def text_of_reply(reply):
    text = reply["choices"][0]["message"]["content"]
    if not isinstance(text, str):
        raise ValueError(f"its content is {text!r:.40}")
    return text


def png(image):
    """PIL image -> data URL."""
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
