"""The fields of the configurations of open_clip and Hugging Face, and what himo does with each.

Sources: open_clip's CLIPVisionCfg, CLIPTextCfg and PreprocessCfg (3.3.0); Hugging Face's
CLIPConfig, CLIPImageProcessor and PreTrainedConfig (transformers 4 and 5).
"""

from collections.abc import Collection, Mapping
from typing import Any

# A field has one of three meanings: the name of the CLIPConfig field that it states; the values
# with which a model computes what himo does; or ANY, where no feature depends on it. None states
# nothing.
ANY = ()
Meaning = str | Collection[Any]
Fields = Mapping[str, Meaning]


def _all(meaning: Meaning, names: str) -> Fields:
    return dict.fromkeys(names.split(), meaning)


_OPEN_CLIP_BLOCKS: Fields = {
    "mlp_ratio": (4,),
    "ls_init_value": (None,),
    "act_kwargs": ({},),
    "norm_kwargs": ({}, {"eps": 1e-5}),
    "block_type": ("default",),
    "output_tokens": ANY,
    **_all((False,), "final_ln_after_pool qk_norm scaled_cosine_attn scale_heads scale_fc"),
    **_all((False,), "scale_attn_inner scale_attn"),
}
OPEN_CLIP_VISION: Fields = {
    **_OPEN_CLIP_BLOCKS,
    "image_size": "image_resolution",
    "layers": "vision_layers",
    "width": "vision_width",
    "patch_size": "vision_patch_size",
    "head_width": ANY,  # read by of_open_clip
    "patch_dropout": ANY,  # used in training only
    **_all((False,), "attentional_pool no_ln_pre input_patchnorm global_average_pool"),
    **_all(ANY, "attn_pooler_queries attn_pooler_heads"),  # used by attentional_pool only
    "pos_embed_type": ("learnable",),
    "pool_type": ("tok",),
    "timm_model_name": ("",),
    # Used by a tower of timm only.
    **_all(ANY, "timm_model_pretrained timm_pool timm_proj timm_proj_bias timm_drop"),
    **_all(ANY, "timm_drop_path"),
}
OPEN_CLIP_TEXT: Fields = {
    **_OPEN_CLIP_BLOCKS,
    "context_length": "context_length",
    "vocab_size": "vocab_size",
    "width": "text_width",
    "heads": "text_heads",
    "layers": "text_layers",
    "tokenizer_mode": ("clip",),
    "tokenizer_kwargs": ({},),
    "pool_type": ("argmax",),
    "proj_type": ("linear",),
    **_all((False,), "embed_cls no_causal_mask proj_bias"),
    "pad_id": ANY,  # used with embed_cls only
    "eos_id": ANY,  # used with another pool_type only
    **_all(("",), "hf_tokenizer_name hf_model_name"),
    **_all(ANY, "hf_model_pretrained hf_proj_type hf_pooler_type"),  # used by that model only
}
OPEN_CLIP_MODEL: Fields = {
    "embed_dim": "embed_dim",
    "quick_gelu": (True, False),
    "custom_text": (True, False),  # the same tower under other names
    **_all(ANY, "vision_cfg text_cfg init_logit_scale output_dict cast_dtype"),
}
OPEN_CLIP_PREPROCESS: Fields = {
    "size": "image_resolution",
    "mode": ("RGB",),
    "mean": "image_mean",
    "std": "image_std",
    "interpolation": "interpolation",
    "resize_mode": "resize_mode",
    "fill_color": ANY,  # used with the resize mode "longest" only
}

# transformers writes these into every configuration; no feature of a CLIPModel depends on them.
_HF_WITHOUT_EFFECT = """
    _attn_implementation_autoset _name_or_path architectures attention_dropout bad_words_ids
    begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dropout dtype early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label initializer_factor
    initializer_range label2id length_penalty logit_scale_init_value max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_scores pad_token_id prefix problem_type remove_invalid_values
    repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings
    tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p
    use_bfloat16 use_cache
"""
_HF_COMMON: Fields = {
    **_all(ANY, _HF_WITHOUT_EFFECT),
    **_all((False,), "add_cross_attention is_decoder is_encoder_decoder"),
    "pruned_heads": ({},),
    "projection_dim": "embed_dim",
}
_HF_TOWER: Fields = {
    **_HF_COMMON,
    "hidden_act": ANY,  # read by of_hugging_face
    "layer_norm_eps": (1e-5,),
    "intermediate_size": ANY,  # the tensors have it, and their shapes are checked
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
    "eos_token_id": ANY,  # read by of_hugging_face
}
HF_MODEL: Fields = {
    **_HF_COMMON,
    "architectures": (["CLIPModel"],),
    "model_type": ("clip",),
    **_all(ANY, "text_config vision_config"),
    **_all(ANY, "text_config_dict vision_config_dict"),  # read by of_hugging_face
}
HF_PREPROCESSOR: Fields = {
    **_all(ANY, "feature_extractor_type image_processor_type processor_class data_format"),
    **_all(ANY, "input_data_format return_tensors device disable_grouping"),
    **_all(ANY, "_valid_processor_keys _processor_class"),
    **_all(ANY, "do_center_crop size crop_size resample"),  # read by of_image_processor
    **_all((True,), "do_resize do_rescale do_normalize do_convert_rgb"),
    **_all((False,), "do_pad default_to_square use_square_size"),
    "rescale_factor": (1 / 255,),
    "image_mean": "image_mean",
    "image_std": "image_std",
}
