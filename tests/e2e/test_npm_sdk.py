"""The `openai` npm SDK, installed for the test into a directory of its own."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.skipif(shutil.which("npm") is None or shutil.which("node") is None, reason="node or npm is missing"),
    pytest.mark.timeout(300),
]

PACKAGE = "openai@7.57.0"
SCRIPT = """
import OpenAI from "openai";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const request = {
  model, max_tokens: 6, temperature: 0, ignore_eos: true,
  messages: [{ role: "user", content: "Grüße 😀" }],
};
const whole = await client.chat.completions.create(request);
let reasoning = "", content = "", finish = null, usage = null, chunks = 0;
const stream = await client.chat.completions.create({
  ...request, stream: true, stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  chunks++;
  usage = chunk.usage ?? usage;
  for (const choice of chunk.choices) {
    reasoning += choice.delta.reasoning_content ?? "";
    content += choice.delta.content ?? "";
    finish = choice.finish_reason ?? finish;
  }
}
const completion = await client.completions.create({ model, prompt: "abc", max_tokens: 3, ignore_eos: true });
const failures = [];
for (const wrong of [{ model: "other" }, { temperature: "hot" }]) {
  try {
    await client.chat.completions.create({ ...request, ...wrong });
  } catch (error) {
    failures.push([error.constructor.name, error.status, error.param]);
  }
}
const aborted = await client.chat.completions.create({ ...request, max_tokens: 3000, stream: true });
for await (const chunk of aborted) {
  if (chunk.choices[0]?.delta?.reasoning_content) break;
}
const models = (await client.models.list()).data.map((entry) => entry.id);
console.log(JSON.stringify({ whole, reasoning, content, finish, usage, chunks, completion, failures, models }));
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("npm")
    (directory / "package.json").write_text('{"name": "sdk-test", "private": true, "type": "module"}')
    (directory / "main.js").write_text(SCRIPT, encoding="utf-8")
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", PACKAGE]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return directory


def test_streamed_whole_and_errors(project: Path, server: Any) -> None:
    done = subprocess.run(
        ["node", "main.js", f"{server.url}/v1", server.model],
        cwd=project,
        env={name: value for name, value in os.environ.items() if "proxy" not in name.lower()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    seen: dict[str, Any] = json.loads(done.stdout)
    message = seen["whole"]["choices"][0]["message"]
    assert seen["reasoning"] == message["reasoning_content"] != ""
    assert seen["content"] == (message["content"] or "")
    assert seen["finish"] == seen["whole"]["choices"][0]["finish_reason"] == "length"
    cached = seen["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert seen["usage"]["prompt_tokens"] - 2 <= cached < seen["usage"]["prompt_tokens"]
    counts = ("prompt_tokens", "completion_tokens", "total_tokens", "completion_tokens_details")
    assert [seen["usage"][c] for c in counts] == [seen["whole"]["usage"][c] for c in counts]
    assert seen["usage"]["completion_tokens"] == 6
    assert seen["completion"]["usage"]["completion_tokens"] == 3
    assert seen["failures"] == [["NotFoundError", 404, "model"], ["BadRequestError", 400, "temperature"]]
    assert seen["models"] == [server.model]
    server.wait_for(server.is_empty, "the pages of the abandoned stream")
