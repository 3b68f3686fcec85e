"""Fields of other dialects that this server knows by name: refused, or accepted without effect on the tokens.

Sources: OpenAI's, DeepSeek's, vLLM's and SGLang's request types. What is in neither table and is no field of a body
is a field that nobody defines: ignored, counted and named in a response header.
"""

from typing import Any

ACCEPTED_WITHOUT_EFFECT = frozenset(
    {
        # Labels, storage and billing.
        *("user", "metadata", "store", "service_tier", "safety_identifier", "moderation", "client_metadata"),
        *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "verbosity", "custom_labels"),
        # Ids and hints for the parts of a cluster.
        *("request_id", "rid", "session_id", "routed_dp_rank", "data_parallel_rank", "disagg_prefill_dp_rank"),
        # How many tokens a chunk of a stream holds is up to the server.
        "stream_interval",
        # Byte-level pieces join without spaces, special or not.
        "spaces_between_special_tokens",
        # The choice of a grammar engine, where there is one.
        "guided_decoding_backend",
        # Only the offline renderer of another server reads it.
        "return_mm_kwargs",
    }
)

REFUSED_EVERYWHERE: dict[str, tuple[Any, ...]] = {
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
    "watermarking": (False,),
    "repetition_detection": (),
    "stop_regex": ([],),
    "logprob_token_ids": (),
    "detokenize": (True,),
    "prompt_embeds": (),
    "input_embeds": (),
    "input_ids": (),
    "logits_processors": ([],),
    "custom_logit_processor": (),
    "custom_params": ({},),
    "guided_whitespace_pattern": (),
    "structural_tag": (),
    "kv_transfer_params": ({},),
    "ec_transfer_params": ({},),
    "bootstrap_host": (),
    "bootstrap_port": (),
    "bootstrap_room": (),
    "session_params": ({},),
    "lora_path": (),
    "ngram_corpus_id": (),
    "vllm_xargs": ({},),
    "images_config": ({},),
    "return_hidden_states": (False,),
    "return_routed_experts": (False,),
    "routed_experts_start_len": (0,),
    "routed_experts_prompt_start": (0,),
    "return_cached_tokens_details": (False,),
    "return_meta_info": (False,),
    "return_prompt_token_ids": (False,),
    "return_prompt_text": (False,),
    "return_token_offsets": (False,),
}
"""With the values that ask for nothing."""

NO_CHOICES: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "prompt_logprobs": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
}
"""Fields of chat and completions that the responses and messages APIs have no place for."""

REASONS = {
    "best_of": "Invalid best_of value (only best_of = n is supported)",
    "detokenize": "`detokenize` must be true: answers are text; `return_token_ids` adds the ids.",
    "input_ids": "`input_ids` is not supported: /v1/completions takes token ids as `prompt`.",
    "return_prompt_token_ids": "`return_prompt_token_ids` is not supported: `return_token_ids` returns both.",
}
"""Why, where more can be said than that a field is not supported."""
