"""The page in a headless Chromium: the same tokens as torch, nothing asked of others, a line where it cannot run.

Needs Chromium and npm's packages in build/edge/browser; `make edge-setup` brings both.
"""

import contextlib
import functools
import json
import random
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from browser import find_browser, open_browser
from edge_models import PROMPTS, ROUTERS, greedy, make_ours, make_tokenizer

from deepseek_serving.edge.browser_export import export_browser, find_runtime
from deepseek_training.data.texts import load_texts

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

RUNTIME = Path(__file__).parents[3] / "build" / "edge" / "browser"
needs_browser = [
    pytest.mark.slow,
    pytest.mark.xdist_group("edge_browser"),
    pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed; make edge-setup brings it"),
    pytest.mark.skipif(not RUNTIME.is_dir(), reason="onnxruntime-web is not installed; make edge-setup brings it"),
]
READY = "!document.getElementById('write').disabled"


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def wait_for(page, condition: str) -> None:
    script = f"new Promise(done => {{ const look = () => {condition} ? done() : setTimeout(look, 50); look(); }})"
    page.run(script)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page") / "out"
    model = make_ours(**ROUTERS["dynamic k"])
    export_browser(model, make_tokenizer(), folder, texts=load_texts("books", "validation"), runtime=RUNTIME)
    return model, folder


def made_strings(number: int) -> list[str]:
    """Pieces of books, code, other alphabets, white space and signs, in any order."""
    draw = random.Random(0)
    words = [word for text in load_texts("books", "validation")[:5] for word in text[:3000].split(" ")]
    pieces = [
        *PROMPTS,
        *words,
        "\U0001f98a",
        "\U0001f468\u200d\U0001f469",
        "\u0663\u0968\u00bd",
        "\t",
        "\n\n",
        "  ",
        "'s",
        "'LL",
    ]
    pieces += ["\u00a0", "\u2003", "<|end|>", "\ufeff", "\u0301", "9" * 7, "_", "\u05e9\u05dc\u05d5\u05dd"]
    joins = (" ", "", "\n", "  ")
    return [draw.choice(joins).join(draw.choices(pieces, k=draw.randint(1, 8))) for _ in range(number)]


class TestInChromium:
    pytestmark = needs_browser

    def test_32_tokens_are_torchs_and_no_request_leaves(self, exported):
        model, folder = exported
        prompts = [*PROMPTS[:4], "a fox " * 20]  # the last longer than a chunk
        with serving(folder) as url, open_browser() as page:
            page.call("Network.enable")
            page.open(url, 820, "light")
            wait_for(page, READY)
            page.run("(async () => { const {Decoder} = await import('./decoder.js');"
                     "window.exact = await Decoder.load('model.onnx'); })()")  # fmt: skip
            for prompt in prompts:
                ids = make_tokenizer()(prompt).input_ids
                written = page.run(
                    f"(async () => {{ exact.facts.eos_token_ids = []; const ids = exact.encode({json.dumps(prompt)});"
                    "const written = []; for await (const step of exact.generate(ids, 32)) written.push(step.id);"
                    "return written; })()"
                )
                assert written == greedy(model, ids, 32)
            asked = [
                one["params"]["request"]["url"] for one in page.events if one["method"] == "Network.requestWillBeSent"
            ]
        assert any(address.endswith(".wasm") for address in asked)
        assert {urlsplit(address).hostname for address in asked if not address.startswith("data:")} == {"127.0.0.1"}

    def test_the_tokenizer_is_ours_on_1000_strings(self, exported):
        _, folder = exported
        texts = made_strings(1000)
        wanted = [make_tokenizer()(text).input_ids for text in texts]
        with serving(folder) as url, open_browser() as page:
            page.open(url, 820, "light")
            wait_for(page, READY)
            found = page.run(f"{json.dumps(texts)}.map(text => decoder.encode(text))")
            back = page.run(f"{json.dumps(wanted)}.map(ids => decoder.decode(ids))")
        assert [text for text, ids, own in zip(texts, found, wanted, strict=True) if ids != own] == []
        decoded = [make_tokenizer().decode(ids, skip_special_tokens=True) for ids in wanted]
        assert back == decoded

    def test_a_visitor_writes_stops_and_sees_the_experts(self, exported, tmp_path):
        _, folder = exported
        with serving(folder) as url, open_browser() as page:
            for width in (390, 820, 1280):
                page.open(url, width, "light")
                wait_for(page, READY)
                page.run("document.getElementById('form').requestSubmit()")
                wait_for(page, "document.getElementById('written').textContent.length > 20")
                page.run("document.getElementById('stop').click()")
                wait_for(page, READY)
                assert "tokens per second" in page.run("document.getElementById('speed').textContent")
                assert page.run("document.querySelectorAll('.cell.now').length") >= 1
                assert page.run("document.querySelectorAll('.layer').length") == 1
                assert page.run("document.documentElement.scrollWidth") <= width
                page.picture(tmp_path / f"{width}.png")
            page.run("document.getElementById('prompt').value = 'fox '.repeat(4000);"
                     "document.getElementById('form').requestSubmit()")  # fmt: skip
            wait_for(page, "document.getElementById('speed').textContent.includes('the model takes 1 to 255')")

    @pytest.mark.parametrize("lack", ["WebAssembly.validate = () => false", "delete globalThis.WebAssembly"])
    def test_without_simd_there_is_one_clear_line(self, exported, lack):
        _, folder = exported
        with serving(folder) as url, open_browser() as page:
            page.call("Page.addScriptToEvaluateOnNewDocument", source=lack)
            page.open(url, 820, "light")
            text = page.run("document.querySelector('main').innerText")
            assert "This browser has no WebAssembly SIMD" in text and "Loading" not in text
            assert page.run("document.getElementById('write').disabled")

    def test_opened_as_a_file_it_says_how_to_serve_it(self, exported):
        _, folder = exported
        with open_browser() as page:
            page.open(folder / "index.html", 820, "light")
            assert "python -m http.server" in page.run("document.getElementById('trouble').innerText")

    def test_a_file_that_is_absent_is_named(self, exported):
        _, folder = exported
        moved = folder / "model.onnx"
        moved.rename(folder / "elsewhere.onnx")
        try:
            with serving(folder) as url, open_browser() as page:
                page.open(url, 820, "light")
                wait_for(page, "!document.getElementById('trouble').hidden")
                assert "model.onnx: the server answers 404" in page.run("document.body.innerText")
        finally:
            (folder / "elsewhere.onnx").rename(moved)


def test_a_runtime_that_is_absent_or_old_says_how_to_fetch_it(tmp_path):
    wanted = "npm install --prefix .* --ignore-scripts onnxruntime-web@.* @huggingface/tokenizers@"
    with pytest.raises(ValueError, match=f"with no onnxruntime-web, expected .*{wanted}"):
        find_runtime(tmp_path)
    package = tmp_path / "node_modules" / "onnxruntime-web"
    package.mkdir(parents=True)
    (package / "package.json").write_text('{"version": "1.2.3"}')
    with pytest.raises(ValueError, match=r"with 1\.2\.3 onnxruntime-web"):
        find_runtime(tmp_path)


def test_the_page_names_no_other_server():
    templates = Path(__file__).parents[3] / "serving" / "edge" / "templates" / "browser"
    for path in templates.iterdir():
        addresses = [
            word for word in path.read_text().split() if "//" in word and ("http:" in word or "https:" in word)
        ]
        assert all("127.0.0.1" in address for address in addresses), path
