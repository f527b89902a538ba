"""The exported page's decoder in a headless browser, timed: the page's own program sends its figures to the server.

`deepseek_cli.benchmarks.edge` calls it.
"""

import functools
import json
import shutil
import subprocess
import tempfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from deepseek_records.exit_codes import RunFailedError

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
_SWITCHES = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"),
)
_PAGE = """<!doctype html><script type="module">
import { Decoder } from "./decoder.js";
const settings = SETTINGS;
async function write(decoder, ids) {
  const written = [];
  for await (const step of decoder.generate(ids, settings.max_tokens)) written.push(step.id);
  return written;
}
async function measure() {
  let began = performance.now();
  const decoder = await Decoder.load(settings.file);
  const load_s = (performance.now() - began) / 1000;
  decoder.facts.eos_token_ids = [];
  const tokens = [];
  for (const ids of settings.prompts) tokens.push(await write(decoder, ids));
  const seconds = [];
  for (let round = 0; round < settings.rounds; round++) {
    began = performance.now();
    for (const ids of settings.prompts) await write(decoder, ids);
    seconds.push((performance.now() - began) / 1000);
  }
  return { load_s, tokens, seconds };
}
const result = await measure().catch((error) => ({ error: String(error) }));
await fetch("/result", { method: "POST", body: JSON.stringify(result) });
</script>"""
_LONGEST_S = 600


def find_browser() -> str | None:
    """Return the path of an installed Chromium; None where there is none."""
    return next((path for path in map(shutil.which, BROWSERS) if path), None)


def measure_browser(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return `load_s`, `seconds` of each round, `tokens` of each prompt, and `memory_mib` of the page's process.

    Args:
        folder: What ``--to browser`` wrote.
        settings: `file`, `prompts`, `max_tokens` and `rounds`.

    Raises:
        RunFailedError: The page failed, or did not answer in ten minutes.
    """
    answered, answers = threading.Event(), []
    page = _PAGE.replace("SETTINGS", json.dumps(settings)).encode()

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/measure":
                super().do_GET()
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def do_POST(self) -> None:
            answers.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()
            answered.set()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        url = f"http://127.0.0.1:{server.server_port}/measure"
        command = [find_browser() or BROWSERS[0], *_SWITCHES, f"--user-data-dir={profile}", url]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            if not answered.wait(_LONGEST_S):
                raise RunFailedError(f"the browser did not answer in {_LONGEST_S} s")
            memory = _page_memory_mib(process.pid)
        finally:
            process.kill()
            process.wait()
            server.shutdown()
            server.server_close()
    if "error" in answers[0]:
        raise RunFailedError(f"the page failed: {answers[0]['error']}")
    return {**answers[0], "memory_mib": memory}


def _page_memory_mib(browser: int) -> float | None:
    """The most memory that a page's process of a browser has held; None where the system does not tell."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"--type=renderer" in (folder / "cmdline").read_bytes() and _is_below(int(folder.name), browser):
                status = (folder / "status").read_text()
                found.append(int(status.split("VmHWM:")[1].split()[0]) / 1024)
        except (OSError, IndexError):  # a process that has ended
            continue
    return max(found, default=None)


def _is_below(process: int, ancestor: int) -> bool:
    while process > 1:
        if process == ancestor:
            return True
        process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return False
