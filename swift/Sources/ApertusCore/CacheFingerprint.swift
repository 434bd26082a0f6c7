import Foundation

/// Digests of what the keys and values of a prompt depend on, as `apertus-mlx` makes them: a prompt
/// cache holds them, and is refused where they differ.
package struct CacheFingerprint: Equatable, Sendable {
    /// Of the config, of a sample of every tensor, of the formats of quantized weights, of tokenizer
    /// and chat template.
    package let model, weights, quantization, template: String

    private static let sampleBytes = 256
    private static let textFiles = [
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    ]

    /// Digest the files of a checked folder; of weights only samples are read.
    package init(_ checkpoint: Checkpoint) throws {
        model = Self.digest(Self.described(checkpoint.config).written)
        weights = try Self.weights(checkpoint)
        quantization = Self.digest(
            Self.sorted(checkpoint.formats).map { "\($0) \($1)" }.joined(separator: "\n"))
        template = try Self.texts(checkpoint.folder)
    }

    /// The digest of a list of tokens.
    package static func tokens(_ ids: [Int]) -> String {
        digest(ids.map(String.init).joined(separator: ","))
    }

    /// What shapes and forward pass depend on, by Python's names in the order of the alphabet.
    private static func described(_ config: ModelConfig) -> JSON {
        func id(_ value: Int32?) -> JSON { value.map { .number("\($0)") } ?? .null }
        func object(_ members: KeyValuePairs<String, JSON>) -> JSON {
            .object(members.map { JSON.Member(key: Array($0.utf8), value: $1) })
        }
        func number(_ value: Double) -> JSON { .number("\(value)") }
        func count(_ value: Int) -> JSON { .number("\(value)") }
        let rope = config.rope
        return object([
            "bos_token_id": id(config.bosTokenId),
            "eos_token_ids": .array(config.eosTokenIds.map(id)),
            "family": .string(Array("apertus".utf8)),
            "head_dim": count(config.headDim),
            "hidden_size": count(config.hiddenSize),
            "intermediate_size": count(config.intermediateSize),
            "max_position_embeddings": count(config.maxPositions),
            "num_attention_heads": count(config.heads),
            "num_hidden_layers": count(config.layers),
            "num_key_value_heads": count(config.kvHeads),
            "output_vocab_size": count(config.outputVocabSize),
            "pad_token_id": id(config.padTokenId),
            "rms_norm_eps": number(Double(config.rmsNormEps)),
            "rope": object([
                "factor": number(rope.factor),
                "high_freq_factor": number(rope.highFreqFactor),
                "low_freq_factor": number(rope.lowFreqFactor),
                "original_max_position_embeddings": count(rope.originalMaxPositions),
                "theta": number(rope.theta),
                "type": .string(Array(rope.kind.rawValue.utf8)),
            ]),
            "tie_word_embeddings": .bool(config.tiesEmbeddings),
            "vocab_size": count(config.vocabSize),
        ])
    }

    private static func weights(_ checkpoint: Checkpoint) throws -> String {
        var digest = Digest256()
        var files: [String: ModelFile] = [:]
        for (name, tensor) in sorted(checkpoint.files.tensors) {
            digest.update(Data("\(name) \(tensor.dtype) \(tensor.shape)\n".utf8))
            let file = try files[tensor.file] ?? ModelFile(checkpoint.files.url(of: tensor))
            files[tensor.file] = file
            for start in [0, tensor.byteCount / 2] {
                digest.update(
                    try file.read(
                        at: tensor.offset + start,
                        count: min(sampleBytes, tensor.byteCount - start)))
            }
        }
        return hexadecimal(digest)
    }

    private static func texts(_ folder: URL) throws -> String {
        var digest = Digest256()
        for name in textFiles {
            let url = folder.appendingPathComponent(name)
            let content =
                ModelFile.exists(url) ? try readFile(url, atMost: ModelFile.mostTokenizer) : Data()
            digest.update(Data("\(name) \(content.count)\n".utf8) + content)
        }
        return hexadecimal(digest)
    }

    private static func sorted<Value>(_ values: [String: Value]) -> [(String, Value)] {
        values.sorted { $0.key.utf8.lexicographicallyPrecedes($1.key.utf8) }
            .map { ($0.key, $0.value) }
    }

    private static func digest(_ text: String) -> String {
        var digest = Digest256()
        digest.update(Data(text.utf8))
        return hexadecimal(digest)
    }

    private static func hexadecimal(_ digest: Digest256) -> String {
        digest.finish().map { byte in
            let digits = String(byte, radix: 16)
            return digits.utf8.count < 2 ? "0\(digits)" : digits
        }.joined()
    }
}
