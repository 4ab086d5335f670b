"""python serving.py FOLDER --out serving.jsonl    `transformers serve` of an exported SigmoidGPT under load, locally.

Needs transformers[serving]. Streams through the `openai` client, one request after another in each, for a while; then
what was lost, what differs from the offline answer, and how the server's memory went.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashsigmoid.record import RecordWriter
from flashsigmoid.samples import tinyshakespeare

NEEDED = ("accelerate", "fastapi", "openai", "uvicorn")
NEW_TOKENS = 24
# body of a request, and what is wrong with it; the last is found out in the midst of its stream
MALFORMED: tuple[tuple[str, str, Any], ...] = (
    ("not JSON", "completions", "{"),
    ("not an object", "completions", [1]),
    ("a prompt of numbers", "completions", {"prompt": [1.5], "max_tokens": 4}),
    ("max_tokens is no number", "completions", {"prompt": "a", "max_tokens": "many"}),
    ("a field that is none", "completions", {"prompt": "a", "softmax": True}),
    ("another model", "completions", {"prompt": "a", "model": "another"}),
    ("no messages", "chat/completions", {"max_tokens": 4}),
    ("longer than the context", "completions", {"prompt": "a" * 4000, "max_tokens": 4}),
    ("longer than the context, streamed", "completions", {"prompt": "a" * 4000, "max_tokens": 4, "stream": True}),
)


def missing() -> list[str]:
    """What `transformers serve` and this file need and is not installed."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


@dataclass
class Seen:
    """What came of the requests."""

    answered: int = 0
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    tokens: int = 0
    first_s: list[float] = field(default_factory=list)  # to the first piece of text
    whole_s: list[float] = field(default_factory=list)


@contextmanager
def served(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server of its own process, and its address; it knows the package only by the modelling file in the folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--trust-remote-code"]
    command += ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port), "--log-level", "error"]
    # the server says a line per request
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, "the server ended before it listened"
            try:
                urllib.request.urlopen(f"{url}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.2)
        else:
            raise TimeoutError("the server did not listen within two minutes")
        yield process, url
    finally:
        process.terminate()
        process.wait(30)


def offline(folder: Path, prompts: list[str]) -> dict[str, str]:
    """The most likely continuation of each, by `generate` in this process."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from flashsigmoid.integrations.transformers import register

    register()
    torch.set_num_threads(1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = {}
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0]
        found[prompt] = tokenizer.decode(tokens[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


def prompts_of(count: int, longest: int, seed: int = 0) -> list[str]:
    """Pieces of the embedded text of random lengths."""
    text, draw = tinyshakespeare().read_text("utf-8"), random.Random(seed)
    starts = [draw.randrange(len(text) - longest) for _ in range(count)]
    return [text[start : start + draw.randint(1, longest)] for start in starts]


def resident_bytes(process: subprocess.Popen[bytes]) -> int:
    """Resident memory of the server."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def listening(process: subprocess.Popen[bytes]) -> set[str]:
    """Addresses on which the server listens, as the kernel writes them."""
    proc = Path(f"/proc/{process.pid}")
    links = {os.readlink(entry) for entry in (proc / "fd").iterdir() if entry.is_symlink()}
    lines = [line.split() for name in ("tcp", "tcp6") for line in (proc / "net" / name).read_text().splitlines()[1:]]
    return {words[1].partition(":")[0] for words in lines if words[3] == "0A" and f"socket:[{words[9]}]" in links}


async def load(url: str, model: str, answers: dict[str, str], streams: int, seconds: float, seen: Seen) -> None:
    """`streams` streams at a time for so long; those that are under way then are waited for."""
    import openai

    end = time.monotonic() + seconds

    async def stream(client: Any, number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < end:
            prompt, start, first, text, reason = draw.choice(list(answers)), time.monotonic(), None, "", None
            try:
                chunks = await client.completions.create(
                    model=model, prompt=prompt, max_tokens=NEW_TOKENS, temperature=0.0, stream=True
                )
                async for chunk in chunks:
                    first = first or time.monotonic()
                    text, reason = text + chunk.choices[0].text, chunk.choices[0].finish_reason
                    seen.tokens += chunk.usage.completion_tokens if chunk.usage else 0
            except (openai.OpenAIError, OSError) as error:
                seen.lost.append(repr(error))
                continue
            if reason is None:
                seen.lost.append(f"a stream without an end: {text!r}")
                continue
            seen.answered += 1
            seen.first_s.append((first or start) - start)
            seen.whole_s.append(time.monotonic() - start)
            if text != answers[prompt]:
                seen.wrong.append(f"{prompt!r}: {text!r}, offline {answers[prompt]!r}")

    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        await asyncio.gather(*(stream(client, number) for number in range(streams)))


def refused(url: str, model: str) -> dict[str, str]:
    """Of each malformed request what it was answered: a status from 400 on, or an error in its stream."""
    found = {}
    for what, path, body in MALFORMED:
        if isinstance(body, dict):
            body = {"model": model, "temperature": 0.0, **body}
        data = body if isinstance(body, str) else json.dumps(body)
        request = urllib.request.Request(f"{url}/v1/{path}", data.encode(), {"Content-Type": "application/json"})
        try:
            said = urllib.request.urlopen(request, timeout=600).read().decode()
            found[what] = "an error in the stream" if 'data: {"error"' in said else "no error"
        except urllib.error.HTTPError as error:
            found[what] = str(error.code)
    return found


async def abandon(url: str, model: str) -> None:
    """Begin streams and leave at the first text."""
    import openai

    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        for _ in range(10):
            options = {"model": model, "prompt": "a", "max_tokens": NEW_TOKENS, "temperature": 0.0}
            chunks = await client.completions.create(stream=True, **options)
            async for _ in chunks:
                break
            await chunks.close()


async def watch(process: subprocess.Popen[bytes], sizes: list[tuple[float, int]]) -> None:
    """Resident memory once a second, until cancelled."""
    while True:
        sizes.append((time.monotonic(), resident_bytes(process)))
        await asyncio.sleep(1.0)


async def under_load(
    process: subprocess.Popen[bytes], url: str, model: str, answers: dict[str, str], streams: int, seconds: float
) -> tuple[Seen, dict[str, str], list[tuple[float, int]]]:
    """The load with malformed requests and abandoned streams a quarter of the time into it."""
    seen, sizes = Seen(), []
    watching = asyncio.create_task(watch(process, sizes))
    loading = asyncio.create_task(load(url, model, answers, streams, seconds, seen))
    await asyncio.sleep(seconds / 4)
    said = await asyncio.to_thread(refused, url, model)
    await abandon(url, model)
    await loading
    watching.cancel()
    return seen, said, sizes


def measure(folder: Path, streams: int, seconds: float, out: Path | None = None, loss: float | None = None) -> dict:
    """Serve, load, compare; the numbers by name, and as records in `out`."""
    folder = folder.absolute()
    config = json.loads((folder / "config.json").read_text("utf-8"))
    answers = offline(folder, prompts_of(64, config["seqlen"] - NEW_TOKENS))
    with served(folder) as (process, url):
        model, alone = str(folder), Seen()
        asyncio.run(load(url, model, answers, 1, 5.0, alone))  # warms up, too
        begin = time.monotonic()
        seen, said, sizes = asyncio.run(under_load(process, url, model, answers, streams, seconds))
        took_s = time.monotonic() - begin
        after = Seen()
        asyncio.run(load(url, model, answers, 1, 1.0, after))
        addresses = listening(process)
    part_s = min(60.0, seconds / 2)
    first = [size for at, size in sizes if at - begin <= part_s]
    last = [size for at, size in sizes if seconds - part_s <= at - begin <= seconds]
    numbers = {
        "requests": (seen.answered + len(seen.lost), ""),
        "lost": (len(seen.lost), ""),
        "different_from_offline": (len(seen.wrong) + len(alone.wrong) + len(after.wrong), ""),
        "different_answers_offline": (len(set(answers.values())), ""),
        "answered_after": (after.answered, ""),
        "malformed_refused": (sum(answer != "no error" for answer in said.values()), ""),
        "resident_first": (statistics.mean(first), "bytes"),
        "resident_last": (statistics.mean(last), "bytes"),
        "resident_last_over_first": (statistics.mean(last) / statistics.mean(first), ""),
        "resident_most_over_first": (max(size for _, size in sizes) / statistics.mean(first), ""),
        "tokens_per_s": (seen.tokens / took_s, "tokens_per_s"),
        "tokens_per_s_of_one_stream": (alone.tokens / sum(alone.whole_s), "tokens_per_s"),
        "first_text_median": (statistics.median(seen.first_s), "s"),
        "answer_median": (statistics.median(seen.whole_s), "s"),
        "answer_longest": (max(seen.whole_s), "s"),
        "listens_elsewhere_than_loopback": (len(addresses - {"0100007F"}), ""),
    }
    if out is not None:
        keep = ("seqlen", "nlayers", "dim", "nheads", "nheads_k", "position", "sigmoid_bias", "dtype")
        settings = {name: config[name] for name in keep} | {"streams": streams, "seconds": seconds}
        settings |= {"new_tokens": NEW_TOKENS, "prompts": len(answers), "val_loss": loss, "continuous_batching": False}
        with RecordWriter(out, settings) as writer:
            for name, (value, unit) in numbers.items():
                writer.write(name, value, unit=unit)
            for what, answer in said.items():
                writer.write("refused", float(answer != "no error"), request=what, answer=answer)
    found: dict[str, Any] = {name: value for name, (value, _) in numbers.items()}
    return found | {"problems": [*seen.lost[:3], *seen.wrong[:3]], "malformed": said}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("    ")[2].partition("\n")[0])
    parser.add_argument("folder", type=Path, help="of `flashsigmoid export`")
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--out", type=Path, help="records")
    given = parser.parse_args()
    for name, value in measure(given.folder, given.streams, given.seconds, given.out).items():
        print(f"{name}: {value}")
