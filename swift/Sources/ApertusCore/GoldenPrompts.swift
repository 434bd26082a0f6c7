import Foundation

/// `apertus_mlx_golden_prompts.json`: prompts and their token ids, for an app to test itself with.
public struct GoldenPrompts: Sendable, Equatable {
    public static let fileName = "apertus_mlx_golden_prompts.json"

    /// A text and its tokens.
    public struct Text: Sendable, Equatable {
        public let text: String
        /// As the text alone is encoded.
        public let ids: [Int32]
    }
    /// A conversation and its prompt.
    public struct Conversation: Sendable, Equatable {
        public let name: String
        public let messages: [Message]
        /// What the model may call; most conversations have none.
        public let tools: [ToolDefinition]
        public let thinks: Bool
        /// As it is rendered for an answer.
        public let ids: [Int32]
    }

    public let texts: [Text]
    public let conversations: [Conversation]

    /// Read the file in `folder`; nil where there is none.
    ///
    /// - Throws: `ApertusError`: it is damaged, or of a version that this package does not know.
    public init?(folder: URL) throws {
        let url = folder.appendingPathComponent(Self.fileName)
        guard ModelFile.exists(url) else { return nil }
        try self.init(readObject(url), name: url.filePath)
    }

    init(_ object: JSON, name: String) throws {
        let reader = try GoldenReader(object, name)
        texts = try reader.entries("texts").map { keys in
            Text(text: try keys.text("text"), ids: try GoldenReader.ids(keys, "token_ids"))
        }
        conversations = try reader.entries("conversations").map { keys in
            Conversation(
                name: try keys.text("name"),
                messages: try Message.list(Given(keys.value("messages"), at: "\(name): messages")),
                tools: try keys.value("tools").map {
                    try ToolDefinition.list(Given($0, at: "\(name): tools"))
                } ?? [],
                thinks: try keys.optionalFlag("enable_thinking") ?? false,
                ids: try GoldenReader.ids(keys, "token_ids"))
        }
    }

    /// The texts that a tokenizer encodes otherwise than the file says.
    public func differing(_ tokenizer: Tokenizer) -> [Text] {
        texts.filter { tokenizer.encode($0.text) != $0.ids }
    }
}

/// `apertus_mlx_golden_answers.json`: how the weights of a folder continue its golden prompts,
/// computed in float32.
public struct GoldenAnswers: Sendable, Equatable {
    public static let fileName = "apertus_mlx_golden_answers.json"

    /// A prompt and the likeliest token each time after it.
    public struct Answer: Sendable, Equatable {
        /// The name of the conversation, or the text, that is continued.
        public let name: String
        public let promptIds: [Int32]
        public let ids: [Int32]
        /// Of each token, in logits: how far ahead of the second likeliest it was.
        public let margins: [Double]

        /// How many of the first tokens any right arithmetic chooses, in 16 bits too.
        public func clearCount(_ clearMargin: Double) -> Int {
            margins.firstIndex { !($0 > clearMargin) } ?? margins.count
        }

        /// Where `found` first differs from what is clear; nil where it does not.
        public func firstDifference(_ found: [Int32], clearMargin: Double) -> Int? {
            (0 ..< clearCount(clearMargin)).first { $0 >= found.count || found[$0] != ids[$0] }
        }
    }

    /// In logits; what 16 bits do to those of a sound model stays below it.
    public let clearMargin: Double
    public let answers: [Answer]

    /// Read the file in `folder`; nil where there is none.
    ///
    /// - Throws: `ApertusError`: it is damaged, or of a version that this package does not know.
    public init?(folder: URL) throws {
        let url = folder.appendingPathComponent(Self.fileName)
        guard ModelFile.exists(url) else { return nil }
        try self.init(readObject(url), name: url.filePath)
    }

    init(_ object: JSON, name: String) throws {
        let reader = try GoldenReader(object, name)
        clearMargin = try reader.keys.number("clear_margin", above: 0, to: 1e6)
        answers = try reader.entries("answers").map { keys in
            let ids = try GoldenReader.ids(keys, "token_ids")
            let margins = (keys.value("margins")?.items ?? []).compactMap(\.double)
            guard margins.count == ids.count, !ids.isEmpty else {
                throw ApertusError(.rejected, "\(name): answers: not one margin for each token")
            }
            return Answer(
                name: try keys.text("name"),
                promptIds: try GoldenReader.ids(keys, "prompt_token_ids"), ids: ids, margins: margins)
        }
    }
}

/// What both files have in common.
private struct GoldenReader {
    static let formatVersion = 1
    let keys: KeyReader
    let name: String

    init(_ object: JSON, _ name: String) throws {
        (keys, self.name) = (KeyReader(object, name), name)
        let version = try keys.integer("format_version", 1 ... 1 << 31)
        guard version == Self.formatVersion else {
            throw ApertusError(
                .rejected,
                "\(name): format_version \(version); this package knows \(Self.formatVersion)")
        }
    }

    func entries(_ key: String) throws -> [KeyReader] {
        guard let items = keys.value(key)?.items else {
            throw ApertusError(.rejected, "\(name): \(key): expected a list")
        }
        return items.map { KeyReader($0, "\(name): \(key)") }
    }

    static func ids(_ keys: KeyReader, _ key: String) throws -> [Int32] {
        try keys.integers(key, 0 ... 1 << 22).map(Int32.init)
    }
}
