"""/metrics: vLLM's names with their labels, numbers that add up, and no label a client could choose."""

import asyncio
import re
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

VLLM = {
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info", "num_preemptions"),
    *("prompt_tokens", "generation_tokens", "request_success", "time_to_first_token_seconds"),
    *("inter_token_latency_seconds", "request_time_per_output_token_seconds", "e2e_request_latency_seconds"),
    *("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"),
    *("request_inference_time_seconds", "request_prompt_tokens", "request_generation_tokens"),
    "request_params_max_tokens",
}
FATHOM = {
    *("pages_total", "pages_free", "slots_total", "slots_free", "unknown_fields", "engine_step_seconds", "engine_up"),
    *("queued_requests", "queued_tokens", "requests_in_flight", "http_responses", "admission_rejections"),
}
VLLM_ITL = "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1.0 2.5 5.0 7.5 10.0 20.0 40.0 80.0"


def test_names_labels_and_sums(serving: Any) -> None:
    async def main() -> None:
        async with serving(answer="hello", step_seconds=0.005) as server:
            answers = [await server.complete("abc", max_tokens=n) for n in (2, 50, 50)]
            await server.complete("abc", **{f"unknown_{n}": 1 for n in range(3)})
            await server.complete("abc", temperature=-1)
            await server.http.get("/one/path/of/many")
            await server.idle()
            text = (await server.http.get("/metrics")).text
            families = {f.name: f for f in text_string_to_metric_families(text)}
            assert {"vllm:" + name for name in VLLM} <= set(families)
            assert {"fathom_" + name for name in FATHOM} <= set(families)
            for name, family in families.items():
                for sample in family.samples:
                    if name.startswith("vllm:"):
                        assert (sample.labels["model_name"], sample.labels["engine"]) == ("sim", "0")

            def value(name: str, **labels: str) -> float:
                (found,) = [
                    s.value
                    for f in families.values()
                    for s in f.samples
                    if s.name == name and labels.items() <= s.labels.items()
                ]
                return found

            usage = [a.json()["usage"] for a in answers]
            generated = sum(u["completion_tokens"] for u in usage) + 6
            assert value("vllm:generation_tokens_total") == generated
            assert value("vllm:prompt_tokens_total") == 4 * 3
            assert value("vllm:request_generation_tokens_sum") == generated
            assert value("vllm:request_success_total", finished_reason="length") == 1
            assert value("vllm:request_success_total", finished_reason="stop") == 3
            assert value("vllm:time_to_first_token_seconds_count") == 4
            assert value("vllm:inter_token_latency_seconds_count") == generated - 4
            assert value("vllm:e2e_request_latency_seconds_count") == 4
            assert value("fathom_unknown_fields_total") == 3
            assert value("fathom_http_responses_total", route="/v1/completions", status="200") == 4
            assert value("fathom_http_responses_total", route="/v1/completions", status="400") == 1
            assert value("fathom_http_responses_total", route="other", status="404") == 1
            assert value("fathom_pages_free") == value("fathom_pages_total") > 0
            assert value("vllm:kv_cache_usage_perc") == 0
            assert "many" not in text
            itl = re.findall(r'inter_token_latency_seconds_bucket{[^}]*le="([^"]+)"', text)
            assert set(VLLM_ITL.split()) < set(itl)

    asyncio.run(main())
