/// Which keys of a `config.json` cannot change what an Apertus computes.
///
/// The rule: a key that nothing reads is accepted if its value is null, if it is one of `inert`
/// (whatever it says), or of `fixed` at a value that says what Apertus does anyway. Any other may
/// change the model's meaning and is refused by name.
enum HarmlessKeys {
    /// What transformers, MLX and training tools write: descriptions, training, outputs, generation.
    static let inert: Set = [
        // About the file, the repository and the tools.
        "architectures", "attn_implementation", "finetuning_task", "id2label", "label2id",
        "model_max_length", "prefix", "pretraining_tp", "problem_type", "task_specific_params",
        "tokenizer_class", "transformers_version", "unsloth_fixed", "unsloth_version",
        // Training.
        "attention_dropout", "attn_pdrop", "embd_pdrop", "gradient_checkpointing",
        "hidden_dropout", "hidden_dropout_prob", "initializer_range", "loss_type", "resid_pdrop",
        "tie_encoder_decoder",
        // How a library computes and what it returns, not which values.
        "chunk_size_feed_forward", "is_decoder", "is_encoder_decoder",
        "keys_to_ignore_at_inference", "max_window_layers", "output_attentions",
        "output_hidden_states", "output_scores", "return_dict", "return_dict_in_generate",
        "tf_legacy_loss", "torchscript", "use_bfloat16", "use_cache", "use_return_dict",
        // Generation, which transformers 4 kept in the config; read from generation_config.json.
        "bad_words_ids", "begin_suppress_tokens", "decoder_start_token_id", "diversity_penalty",
        "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
        "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups",
        "num_beams", "num_return_sequences", "remove_invalid_values", "repetition_penalty",
        "sep_token_id", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
    ]
    /// Keys by which a checkpoint asks for its own code to be run; never followed.
    static let code: Set = ["auto_map", "model_file", "custom_pipelines", "trust_remote_code"]
    /// The parts of Apertus 1.5 that are not text.
    static let multimodal: Set = [
        "audio_config", "audio_token_id", "audio_tokenizer_config", "image_token_id",
        "vision_config", "vision_tokenizer_config",
    ]
    /// Keys that other model families use; Apertus has them only at these values, or null.
    static let fixed: [(key: String, value: JSON?)] = [
        ("hidden_act", .string(Array("xielu".utf8))), ("mlp_bias", .bool(false)),
        ("attention_bias", .bool(false)), ("qk_norm", .bool(true)), ("post_norm", .bool(false)),
        ("rope_traditional", .bool(false)), ("partial_rotary_factor", .number("1.0")),
        ("cross_attention_hidden_size", nil), ("add_cross_attention", .bool(false)),
        ("sliding_window", nil), ("use_sliding_window", .bool(false)), ("is_causal", .bool(true)),
        ("pruned_heads", .object([])),
    ]

    /// Refuse values that only other models have, and account for their keys.
    static func refuseOtherModels(_ keys: KeyReader, _ name: String) throws {
        for (key, allowed) in fixed {
            guard let found = keys.value(key), !(allowed?.means(found) ?? false) else { continue }
            throw notOurs(name, key, found, allowed.map { "only \($0.shown) is" } ?? "is not")
        }
        let full = JSON.string(Array("full_attention".utf8))
        if let kinds = keys.value("layer_types"), !(kinds.items?.allSatisfy { $0 == full } ?? false) {
            throw notOurs(name, "layer_types", kinds, "only \(full.shown) is")
        }
        keys.ignore(fixed.map(\.key) + ["layer_types"])
    }

    private static func notOurs(
        _ name: String, _ key: String, _ found: JSON, _ implemented: String
    ) -> ApertusError {
        ApertusError(
            .rejected,
            "\(name): \(key): \(found.shown.cut(60)): not an Apertus we implement "
                + "(\(implemented) implemented)")
    }
}
