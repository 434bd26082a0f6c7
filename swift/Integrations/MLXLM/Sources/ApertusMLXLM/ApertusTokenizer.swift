import ApertusCore
import Foundation
import MLXLMCommon

/// Gives mlx-swift-lm the tokenizer and the chat format of ApertusKit; no other package is needed.
///
/// ```swift
/// await registerApertus()
/// let container = try await LLMModelFactory.shared.loadContainer(
///     from: folder, using: ApertusTokenizerLoader())
/// let session = ChatSession(container)
/// ```
///
/// Load with `LLMModelFactory.shared`: the free function tries every linked factory and shows the
/// last one's error.
public struct ApertusTokenizerLoader: TokenizerLoader {
    public init() {}

    /// - Throws: `ApertusError`, naming the file.
    public func load(from directory: URL) async throws -> any MLXLMCommon.Tokenizer {
        try ApertusTokenizer(folder: directory)
    }
}

/// ApertusKit's tokenizer under mlx-swift-lm's protocol.
///
/// Control tokens have no spelling in texts: what a message says stays text.
public struct ApertusTokenizer: MLXLMCommon.Tokenizer {
    private let tokenizer: ApertusCore.Tokenizer
    private let config: ModelConfig
    private let manifest: Manifest?

    /// - Throws: `ApertusError`, naming the file.
    public init(folder: URL) throws {
        config = try ModelConfig(folder: folder)
        tokenizer = try ApertusCore.Tokenizer(folder: folder)
        manifest = try Manifest(folder: folder)
    }

    public func encode(text: String, addSpecialTokens: Bool) -> [Int] {
        let bos = addSpecialTokens ? config.bosTokenId.map { [$0] } ?? [] : []
        return (bos + tokenizer.encode(text)).map(Int.init)
    }

    public func decode(tokenIds: [Int], skipSpecialTokens: Bool) -> String {
        let ids = tokenIds.compactMap { Int32(exactly: $0) }
            .filter { !skipSpecialTokens || !tokenizer.isSpecial($0) }
        return String(decoding: ids.flatMap { tokenizer.bytes(of: $0) }, as: UTF8.self)
    }

    public func convertTokenToId(_ token: String) -> Int? {
        (0 ..< Int32(tokenizer.size)).first { tokenizer.bytes(of: $0).elementsEqual(token.utf8) }
            .map(Int.init)
    }

    public func convertIdToToken(_ id: Int) -> String? {
        guard let id = Int32(exactly: id), !tokenizer.bytes(of: id).isEmpty else { return nil }
        return String(decoding: tokenizer.bytes(of: id), as: UTF8.self)
    }

    public var bosToken: String? { config.bosTokenId.flatMap { convertIdToToken(Int($0)) } }
    public var eosToken: String? { config.eosTokenIds.first.flatMap { convertIdToToken(Int($0)) } }
    public var unknownToken: String? { nil }

    /// The prompt of a conversation, as the model was trained on it.
    ///
    /// - Parameters:
    ///   - messages: as OpenAI's API has them: `role`, `content`, `tool_calls`, `tool_call_id`.
    ///   - additionalContext: `enable_thinking` says whether the model deliberates first.
    /// - Throws: `ApertusError`: the folder's manifest names no form that this package writes, or a
    ///   message is none.
    public func applyChatTemplate(
        messages: [[String: any Sendable]], tools: [[String: any Sendable]]?,
        additionalContext: [String: any Sendable]?
    ) throws -> [Int] {
        guard let template = manifest?.chatTemplate else {
            throw ApertusError(
                .rejected,
                "no manifest says of which form the chat template is; convert the model with "
                    + "apertus-mlx"
            )
        }
        let format = try ChatFormat(
            template, system: manifest?.defaultSystem, tokenizer: tokenizer, bos: config.bosTokenId)
        let definitions = try tools.map { try ToolDefinition.list(json: data($0)) } ?? []
        let thinks = additionalContext?["enable_thinking"] as? Bool ?? false
        let ids = try format.prompt(
            Message.list(json: data(messages)), tools: definitions, thinks: thinks)
        return ids.map(Int.init)
    }

    private func data(_ value: Any) throws -> Data {
        guard JSONSerialization.isValidJSONObject(value) else {
            throw ApertusError(.usage, "messages and tools hold what JSON cannot")
        }
        return try JSONSerialization.data(withJSONObject: value)
    }
}
