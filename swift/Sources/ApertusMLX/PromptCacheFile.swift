import ApertusCore
import Foundation
import MLX

/// Keys and values of a prefix on disk, in the form of `apertus-mlx generate --prompt-cache`.
///
/// A safetensors file, whose metadata says what the numbers depend on. All names, shapes and types
/// follow from form, model and length: whatever differs from them is refused, and no array is read
/// before.
public struct PromptCacheFile {
    public let url: URL
    private let madeWith: CacheFingerprint

    private static let format = "apertus-mlx prompt cache", version = "3"
    private static let tokensName = "tokens"
    private static let damaged = "the file is damaged; delete it and let it be made anew"
    private static let anew = "delete it and let it be made anew"

    /// The file at `url`, of the model in `folder`.
    ///
    /// - Throws: `ApertusError`: see `Checkpoint`.
    public init(_ url: URL, modelFolder folder: URL) throws {
        self.url = url
        madeWith = try CacheFingerprint(Checkpoint(folder: folder))
    }

    /// Write what `prefix` holds; whole or not at all.
    ///
    /// - Throws: `ApertusError`: of kind `usage`, if it holds nothing, `resource`, if the file cannot
    ///   be written.
    public func save(_ prefix: CachedPrefix) throws {
        let tokens = try prefix.tokens
        guard !tokens.isEmpty else {
            throw ApertusError(.usage, "\(url.filePath): no prompt has been computed to keep")
        }
        var arrays = [Self.tokensName: MLXArray(tokens)]
        for (index, layer) in try prefix.export().enumerated() {
            for (name, array) in layer { arrays["layers.\(index).\(name)"] = array }
        }
        var metadata = dependencies(prefix)
        metadata["positions"] = "\(tokens.count)"
        metadata["tokens"] = CacheFingerprint.tokens(tokens)
        // mlx-swift knows a file's form by the end of its name alone.
        try writeWhole(url, suffix: ".safetensors") { unfinished in
            try catchingMLX("keeping a prompt") {
                eval(Array(arrays.values))
                try MLX.save(arrays: arrays, metadata: metadata, url: unfinished)
            }
            _ = try SafetensorsHeader.read(unfinished)  // a full disk shows here
        }
    }

    /// Have `prefix` hold what is in the file.
    ///
    /// - Throws: `ApertusError`, which names the file: `notFound` where there is none; `rejected`: it
    ///   is damaged, or was made by another model, form of cache or type of numbers.
    public func restore(_ prefix: CachedPrefix) throws {
        guard ModelFile.exists(url) else {
            throw ApertusError(.notFound, "\(url.filePath): no such prompt cache")
        }
        let real = url.resolvingSymlinksInPath()  // the user's own, so that a link may lead anywhere
        let tensors = try SafetensorsHeader.read(real)
        let metadata = try SafetensorsHeader.metadata(real)
        try require(metadata, dependencies(prefix))
        let count = try positions(metadata["positions"] ?? "", prefix.model.config)
        try require(tensors, prefix, count)
        var arrays = try read(real)
        let tokens = arrays.removeValue(forKey: Self.tokensName)?.asArray(Int32.self).map(Int.init)
        guard let tokens, CacheFingerprint.tokens(tokens) == metadata["tokens"] else {
            throw refusal("tokens do not match their fingerprint; \(Self.damaged)")
        }
        var layers = Array(repeating: [String: MLXArray](), count: prefix.model.config.layers)
        for (name, array) in arrays {
            try requireFinite(array, name)
            let parts = name.split(separator: ".", maxSplits: 2)
            guard parts.count == 3, let index = Int(parts[1]), layers.indices.contains(index) else {
                throw refusal("was changed while it was read; start again")
            }
            layers[index][String(parts[2])] = array
        }
        do {
            try prefix.restore(tokens: tokens, layers: layers)
        } catch let error as ApertusError where error.kind == .rejected {
            throw refusal("\(error); \(Self.damaged)")
        }
    }
}

extension PromptCacheFile {
    /// What has to be the same where a file is made and where it is read.
    private func dependencies(_ prefix: CachedPrefix) -> [String: String] {
        [
            "format": Self.format, "format_version": Self.version,
            "form": prefix.form.json, "arithmetic": prefix.model.arithmetic,
            "model": madeWith.model, "weights": madeWith.weights,
            "quantization": madeWith.quantization, "template": madeWith.template,
        ]
    }

    private func require(_ found: [String: String], _ wanted: [String: String]) throws {
        func differs(_ key: String) -> Bool { found[key] != wanted[key] }
        if differs("format") { throw refusal("is not a prompt cache of apertus-mlx") }
        if differs("format_version") {
            throw refusal(
                "format version \(quoted(String((found["format_version"] ?? "").prefix(20)))), this "
                    + "program reads \(Self.version); \(Self.anew)")
        }
        for (key, spoken) in [
            ("model", "model (its config differs)"), ("weights", "revision of the weights"),
            ("quantization", "quantization"), ("template", "tokenizer or chat template"),
        ] where differs(key) {
            throw refusal("was made with another \(spoken); \(Self.anew)")
        }
        if differs("form") {
            throw refusal(
                "holds a cache of another form; give the options of the cache that it was made with, "
                    + "or delete it")
        }
        if differs("arithmetic") {
            throw refusal(
                "was made with another --compute, --precision or --dtype than "
                    + "\(wanted["arithmetic"]!); \(Self.anew)")
        }
    }

    private func positions(_ text: String, _ config: ModelConfig) throws -> Int {
        let isDigits = text.utf8.allSatisfy { (0x30 ... 0x39).contains($0) }
        guard isDigits, text.utf8.count < 10, let count = Int(text),
            (1 ... config.maxPositions).contains(count)
        else {
            throw refusal(
                "positions \(quoted(String(text.prefix(20)))): expected 1 to \(config.maxPositions); "
                    + Self.damaged)
        }
        return count
    }

    /// Refuse a file whose arrays are not those of a cache after `count` tokens.
    private func require(
        _ tensors: [TensorInfo], _ prefix: CachedPrefix, _ count: Int
    ) throws {
        var wanted = [Self.tokensName: ExportedArray(shape: [count], type: .int32)]
        for (index, layer) in prefix.exported(count).enumerated() {
            for (name, array) in layer { wanted["layers.\(index).\(name)"] = array }
        }
        for tensor in tensors {
            guard let array = wanted.removeValue(forKey: tensor.name) else {
                throw refusal("unexpected array \(quoted(String(tensor.name.prefix(80))))")
            }
            guard tensor.dtype == array.type.safetensors else {
                throw refusal("\(tensor.name): type \(tensor.dtype), expected \(array.type.safetensors)")
            }
            guard tensor.shape == array.shape else {
                throw refusal(
                    "\(tensor.name): shape \(tensor.shape), expected \(array.shape); \(Self.damaged)")
            }
        }
        if let missing = wanted.filter({ !$0.value.isOptional }).keys.min() {
            throw refusal("\(missing) is missing; \(Self.damaged)")
        }
    }

    private func read(_ real: URL) throws -> [String: MLXArray] {
        do {
            if real.pathExtension == "safetensors" { return try evaluated(real) }
            // mlx-swift knows a file's form by the end of its name alone.
            let link = FileManager.default.temporaryDirectory
                .appendingPathComponent("\(UUID().uuidString).safetensors")
            try FileManager.default.createSymbolicLink(at: link, withDestinationURL: real)
            defer { try? FileManager.default.removeItem(at: link) }
            return try evaluated(link)
        } catch let error as ApertusError {
            throw error
        } catch {
            throw refusal("cannot be read (\(error))")
        }
    }

    private func evaluated(_ file: URL) throws -> [String: MLXArray] {
        try catchingMLX(url.filePath, kind: .rejected) {
            let arrays = try loadArrays(url: file)
            eval(Array(arrays.values))
            return arrays
        }
    }

    private func requireFinite(_ array: MLXArray, _ name: String) throws {
        guard array.dtype.isFloatingPoint else { return }
        // Of what is not finite, nothing but NaN is left.
        let isFinite = try catchingMLX(url.filePath) {
            (array * Float(0) .== Float(0)).all().item(Bool.self)
        }
        if !isFinite { throw refusal("\(name): has values that are not finite; \(Self.damaged)") }
    }

    private func refusal(_ words: String) -> ApertusError {
        ApertusError(.rejected, "\(url.filePath): \(words)")
    }
}

extension ApertusModel {
    /// In words, what its numbers depend on beside the checkpoint, by more than rounding.
    var arithmetic: String {
        let type =
            switch computeType {
            case .bfloat16: "bfloat16"
            case .float16: "float16"
            default: "float32"
            }
        return "--compute mlx in \(type)"
    }
}

extension DType {
    /// As a safetensors file names it.
    fileprivate var safetensors: String {
        switch self {
        case .bfloat16: "BF16"
        case .float16: "F16"
        case .float32: "F32"
        case .int32: "I32"
        case .uint32: "U32"
        default: "\(self)"
        }
    }
}
