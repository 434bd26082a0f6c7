import Foundation

/// `generation_config.json`: stop ids and the sampling that a model's makers recommend.
public struct GenerationConfig: Sendable, Equatable {
    public static let fileName = "generation_config.json"

    public var eosTokenIds: [Int32] = []
    public var doSample: Bool?
    public var temperature, topP, minP, repetitionPenalty: Double?
    public var topK: Int?
    /// Present, but not implemented here (beam search and the like).
    public var ignoredKeys: [String] = []

    /// What an absent file says: nothing.
    public init() {}

    /// Read the file in `folder`; an absent one says nothing.
    ///
    /// - Throws: `ApertusError` that names the key: damaged, or out of range (ids: of the vocabulary).
    public init(folder: URL, vocabSize: Int) throws {
        let url = folder.appendingPathComponent(Self.fileName)
        guard ModelFile.exists(url) else {
            self.init()
            return
        }
        try self.init(readObject(url), vocabSize, name: url.filePath)
    }

    init(_ object: JSON, _ vocabSize: Int, name: String) throws {
        let keys = KeyReader(object, name)
        keys.ignore(Self.inert)
        eosTokenIds = try keys.integers("eos_token_id", 0 ... max(vocabSize, 1) - 1).map(Int32.init)
        doSample = try keys.optionalFlag("do_sample")
        topK = try keys.optionalInteger("top_k", 0 ... max(vocabSize, 1))
        temperature = try Self.number(keys, "temperature", 0 ... 100, "0 to 1e+02")
        topP = try Self.number(keys, "top_p", 0x1p-126 ... 1, "1.2e-38 to 1")
        minP = try Self.number(keys, "min_p", 0x1p-126 ... 1, "0 (off), or 1.2e-38 to 1", orZero: true)
        repetitionPenalty = try Self.number(keys, "repetition_penalty", 1e-20 ... 100, "1e-20 to 1e+02")
        ignoredKeys = keys.unread
    }

    /// Keys that describe the file or repeat the config; they change nothing about a single sequence.
    private static let inert: Set = [
        "bos_token_id", "cache_implementation", "max_length", "max_new_tokens", "min_length",
        "output_attentions", "output_hidden_states", "pad_token_id", "return_dict_in_generate",
        "transformers_version", "use_cache",
    ]

    private static func number(
        _ keys: KeyReader, _ key: String, _ range: ClosedRange<Double>, _ words: String,
        orZero: Bool = false
    ) throws -> Double? {
        let written = keys.value(key)
        guard let value = try keys.optionalNumber(key, above: -.infinity, to: .infinity) else {
            return nil
        }
        guard range.contains(value) || (orZero && value == 0) else {
            throw keys.error(key, "a number, \(words)", written ?? .null)
        }
        return value
    }
}
