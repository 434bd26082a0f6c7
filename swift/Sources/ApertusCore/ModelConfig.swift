import Foundation

/// `config.json` of an Apertus checkpoint: all that its shapes and its forward pass depend on.
///
/// Reads the flat style of transformers 4 (and of MLX folders) and the `rope_parameters` style of
/// transformers 5. Whatever is not implemented is refused by name: a wrong default computes nonsense
/// in silence.
public struct ModelConfig: Sendable, Equatable {
    public static let fileName = "config.json"

    public let hiddenSize, intermediateSize, layers, heads, kvHeads, headDim: Int
    /// Rows of the embedding.
    public let vocabSize: Int
    /// Rows of the head.
    public let outputVocabSize: Int
    /// Positions that the model was made for.
    public let maxPositions: Int
    public let rmsNormEps: Float
    public let tiesEmbeddings: Bool
    public let rope: Rope
    /// `bfloat16`, `float16`, `float32`, or nil where the file does not say.
    public let dtype: String?
    public let bosTokenId: Int32?
    public let eosTokenIds: [Int32]
    public let padTokenId: Int32?
    /// Nil where no weights are quantized.
    public let quantization: Quantization?
    /// A method that compresses plain weights at loading, whose block may be left over beside
    /// weights that are plain. Where they are not, `Checkpoint` refuses them.
    package let leftOverMethod: String?

    /// Positions per radian of each rotation, what MLX calls `freqs`.
    public var wavelengths: [Float] { rope.wavelengths(headDim: headDim) }

    /// Read the file in `folder`.
    ///
    /// - Throws: `ApertusError` that names the file and the key: it is missing, damaged, or describes
    ///   a model that is not an Apertus that this package implements.
    public init(folder: URL) throws {
        try ModelFile.requireFolder(folder)
        let url = folder.appendingPathComponent(Self.fileName)
        guard ModelFile.exists(url) else {
            throw ApertusError(
                .rejected, "\(folder.filePath): no \(Self.fileName); not a model folder")
        }
        try self.init(readObject(url), name: url.filePath)
    }

    /// Read the contents of a `config.json`; `name` is what error messages call it.
    public init(json: Data, name: String = fileName) throws {
        try self.init(parseObject(json, name: name), name: name)
    }
}

extension ModelConfig {
    // Bounds that no released model comes near; beyond them a config is damaged or hostile.
    private static let widest = 1 << 20
    private static let mostLayers = 1024
    private static let mostTokens = 1 << 22
    // Below the smallest normal Float an epsilon is none, and rows of zeros become NaN.
    private static let leastEps = 1.2e-38

    private static let families = [
        "apertus": "Apertus", "apertus1p5": "Apertus 1.5", "apertus1p5_text": "Apertus 1.5",
    ]
    private static let repeatedOutside: Set = [
        "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "dtype",
        "torch_dtype", "quantization", "quantization_config", "output_vocab_size", "vocab_size",
    ]

    private init(_ object: JSON, name: String) throws {
        let outer = KeyReader(object, name)
        let type = try outer.text("model_type")
        guard let family = Self.families[type] else {
            throw ApertusError(
                .rejected,
                "\(name): model_type: \(quoted(type.cut(60))) is not supported; "
                    + "this package runs 'apertus'")
        }
        var keys = outer
        if let text = try outer.object("text_config") {
            outer.ignore(HarmlessKeys.inert.union(HarmlessKeys.multimodal).union(HarmlessKeys.code))
            outer.ignore(Self.repeatedOutside)
            try outer.refuseUnread()
            // Keys beside text_config hold for the whole model, unless the text part repeats them.
            let shared = (object.members ?? []).filter {
                Self.repeatedOutside.contains(String(decoding: $0.key, as: UTF8.self))
            }
            keys = KeyReader(.object(shared + (text.members ?? [])), "\(name): text_config")
            let written = try keys.optionalText("model_type") ?? ""
            let inner = written.isEmpty ? type : written
            guard Self.families[inner] == family else {
                throw ApertusError(
                    .rejected,
                    "\(name): text_config.model_type: \(quoted(inner.cut(60))) is not text")
            }
        }
        try self.init(keys, name)
        keys.ignore(HarmlessKeys.inert.union(HarmlessKeys.code).union(HarmlessKeys.multimodal))
        try keys.refuseUnread()
        if type != "apertus" {
            throw ApertusError(
                .rejected,
                "\(name): model_type: \(quoted(type)): \(family) is multimodal; extract its text "
                    + "part: apertus-mlx convert")
        }
    }

    private init(_ keys: KeyReader, _ name: String) throws {
        try HarmlessKeys.refuseOtherModels(keys, name)
        hiddenSize = try keys.integer("hidden_size", 1 ... Self.widest)
        intermediateSize = try keys.integer("intermediate_size", 1 ... Self.widest)
        heads = try keys.integer("num_attention_heads", 1 ... Self.widest)
        layers = try keys.integer("num_hidden_layers", 1 ... Self.mostLayers)
        vocabSize = try keys.integer("vocab_size", 1 ... Self.mostTokens)
        maxPositions = try keys.integer("max_position_embeddings", 1 ... Rope.longestContext)
        kvHeads = try keys.optionalInteger("num_key_value_heads", 1 ... Self.widest) ?? heads
        if heads % kvHeads != 0 {
            throw ApertusError(
                .rejected,
                "\(name): num_key_value_heads: \(kvHeads) does not divide num_attention_heads (\(heads))")
        }
        if !keys.has("head_dim"), hiddenSize % heads != 0 {
            throw ApertusError(
                .rejected,
                "\(name): num_attention_heads: \(heads) does not divide hidden_size (\(hiddenSize)), "
                    + "and there is no head_dim")
        }
        headDim = try keys.optionalInteger("head_dim", 2 ... Self.widest) ?? hiddenSize / heads
        if headDim % 2 != 0 {
            throw ApertusError(
                .rejected, "\(name): head_dim: \(headDim) is odd; rotary embedding needs pairs")
        }
        outputVocabSize =
            try keys.optionalInteger("output_vocab_size", 1 ... vocabSize) ?? vocabSize
        tiesEmbeddings = try keys.optionalFlag("tie_word_embeddings") ?? false
        if tiesEmbeddings, outputVocabSize != vocabSize {
            throw ApertusError(
                .rejected,
                "\(name): output_vocab_size: \(outputVocabSize) with tied embeddings of "
                    + "\(vocabSize) rows is not implemented")
        }
        let written = try WrittenQuantization(keys, name)
        rmsNormEps = Float(try keys.number("rms_norm_eps", above: Self.leastEps, to: 1))
        rope = try Rope(keys, name)
        dtype = try Self.readDtype(keys, name)
        let ids = 0 ... vocabSize - 1
        bosTokenId = try keys.optionalInteger("bos_token_id", ids).map(Int32.init)
        eosTokenIds = try keys.integers("eos_token_id", ids).map(Int32.init)
        // -1 is how some tools write that there is none.
        let pad = try keys.optionalInteger("pad_token_id", -1 ... vocabSize - 1)
        padTokenId = pad == -1 ? nil : pad.map(Int32.init)
        if case .mlx(let found) = written { quantization = found } else { quantization = nil }
        leftOverMethod = try written.refuseForeign(name)
    }

    private static func readDtype(_ keys: KeyReader, _ name: String) throws -> String? {
        guard let written = try keys.eitherText("dtype", "torch_dtype") else { return nil }
        let dtype = written.hasPrefix("torch.") ? String(written.dropFirst(6)) : written
        guard ["bfloat16", "float16", "float32"].contains(dtype) else {
            throw ApertusError(
                .rejected,
                "\(name): dtype: \(quoted(written.cut(60))): expected bfloat16, float16, float32")
        }
        return dtype
    }
}
