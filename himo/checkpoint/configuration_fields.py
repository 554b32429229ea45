"""The fields of the configurations of open_clip and Hugging Face: which himo uses, or computes.

open_clip's are those of its CLIPVisionCfg, CLIPTextCfg and PreprocessCfg (3.3.0); Hugging Face's
those of CLIPConfig, CLIPImageProcessor and what PreTrainedConfig adds (transformers 4 and 5).
"""

from collections.abc import Collection, Mapping
from typing import Any

# The fields of each part: the one of CLIPConfig that it is; or the values with which a model
# computes what himo does; or ANY, where features do not depend on it. None is never stated.
ANY = ()
Fields = Mapping[str, str | Collection[Any]]

_OPEN_CLIP_BLOCKS: Fields = {
    "mlp_ratio": (4,),
    "ls_init_value": (None,),
    "final_ln_after_pool": (False,),
    "output_tokens": ANY,
    "act_kwargs": ({},),
    "norm_kwargs": ({}, {"eps": 1e-5}),
    "block_type": ("default",),
    **dict.fromkeys(
        ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn"), (False,)
    ),
    "scale_fc": (False,),
}
OPEN_CLIP_VISION: Fields = {
    **_OPEN_CLIP_BLOCKS,
    "image_size": "image_resolution",
    "layers": "vision_layers",
    "width": "vision_width",
    "patch_size": "vision_patch_size",
    "head_width": ANY,  # read apart
    "patch_dropout": ANY,  # of training alone
    "attentional_pool": (False,),
    "attn_pooler_queries": ANY,  # of that pooling, as the next
    "attn_pooler_heads": ANY,
    "no_ln_pre": (False,),
    "input_patchnorm": (False,),
    "global_average_pool": (False,),
    "pos_embed_type": ("learnable",),
    "pool_type": ("tok",),
    "timm_model_name": ("",),
    **dict.fromkeys(  # of a tower of timm's
        (
            "timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop",
            "timm_drop_path",
        ),
        ANY,
    ),
}  # fmt: skip
OPEN_CLIP_TEXT: Fields = {
    **_OPEN_CLIP_BLOCKS,
    "context_length": "context_length",
    "vocab_size": "vocab_size",
    "width": "text_width",
    "heads": "text_heads",
    "layers": "text_layers",
    "hf_tokenizer_name": ("",),
    "tokenizer_mode": ("clip",),
    "tokenizer_kwargs": ({},),
    "embed_cls": (False,),
    "pad_id": ANY,  # for embed_cls alone
    "eos_id": ANY,  # for another pool_type alone
    "no_causal_mask": (False,),
    "pool_type": ("argmax",),
    "proj_bias": (False,),
    "proj_type": ("linear",),
    "hf_model_name": ("",),
    **dict.fromkeys(("hf_model_pretrained", "hf_proj_type", "hf_pooler_type"), ANY),  # of that one
}
OPEN_CLIP_MODEL: Fields = {
    "embed_dim": "embed_dim",
    "quick_gelu": (True, False),
    "vision_cfg": ANY,
    "text_cfg": ANY,
    "custom_text": (True, False),  # the same tower under other names
    "init_logit_scale": ANY,
    "output_dict": ANY,
    "cast_dtype": ANY,
}
OPEN_CLIP_PREPROCESS: Fields = {
    "size": "image_resolution",
    "mode": ("RGB",),
    "mean": "image_mean",
    "std": "image_std",
    "interpolation": "interpolation",
    "resize_mode": "resize_mode",
    "fill_color": ANY,  # for the resize mode "longest" alone
}

# What transformers writes into every configuration, and no feature of a CLIPModel depends on.
_HF_COMMON: Fields = {
    **dict.fromkeys(
        (
            "_attn_implementation_autoset", "_name_or_path", "architectures", "bad_words_ids",
            "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward",
            "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty",
            "do_sample", "dropout", "dtype", "early_stopping", "encoder_no_repeat_ngram_size",
            "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
            "forced_eos_token_id", "gradient_checkpointing", "id2label", "initializer_factor",
            "initializer_range", "label2id", "length_penalty", "logit_scale_init_value",
            "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
            "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores",
            "pad_token_id", "prefix", "problem_type", "remove_invalid_values",
            "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id",
            "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss",
            "tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class", "top_k", "top_p",
            "torch_dtype", "torchscript", "transformers_version", "typical_p", "use_bfloat16",
            "use_cache", "attention_dropout",
        ),
        ANY,
    ),
    **dict.fromkeys(("add_cross_attention", "is_decoder", "is_encoder_decoder"), (False,)),
    "pruned_heads": ({},),
    "projection_dim": "embed_dim",
}  # fmt: skip
_HF_TOWER: Fields = {
    **_HF_COMMON,
    "hidden_act": ANY,  # read apart
    "layer_norm_eps": (1e-5,),
    "intermediate_size": ANY,  # that of the tensors, which are compared with the model
}
HF_VISION: Fields = {
    **_HF_TOWER,
    "model_type": ("clip_vision_model",),
    "hidden_size": "vision_width",
    "num_hidden_layers": "vision_layers",
    "num_attention_heads": "vision_heads",
    "num_channels": (3,),
    "image_size": "image_resolution",
    "patch_size": "vision_patch_size",
}
HF_TEXT: Fields = {
    **_HF_TOWER,
    "model_type": ("clip_text_model",),
    "hidden_size": "text_width",
    "num_hidden_layers": "text_layers",
    "num_attention_heads": "text_heads",
    "max_position_embeddings": "context_length",
    "vocab_size": "vocab_size",
    "eos_token_id": ANY,  # read apart
}
HF_MODEL: Fields = {
    **_HF_COMMON,
    "architectures": (["CLIPModel"],),
    "model_type": ("clip",),
    "text_config": ANY,
    "vision_config": ANY,
    "text_config_dict": ANY,  # read apart
    "vision_config_dict": ANY,
}
HF_PREPROCESSOR: Fields = {
    **dict.fromkeys(
        ("feature_extractor_type", "image_processor_type", "processor_class", "data_format",
         "input_data_format", "return_tensors", "device", "disable_grouping",
         "_valid_processor_keys", "_processor_class"),
        ANY,
    ),
    **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), (True,)),
    **dict.fromkeys(("do_pad", "default_to_square", "use_square_size"), (False,)),
    **dict.fromkeys(("do_center_crop", "size", "crop_size", "resample"), ANY),  # read apart
    "rescale_factor": (1 / 255, 0.00392156862745098),
    "image_mean": "image_mean",
    "image_std": "image_std",
}  # fmt: skip
