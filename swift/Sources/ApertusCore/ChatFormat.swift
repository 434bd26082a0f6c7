import Foundation

/// Writes conversations as the prompts that a model was trained on; control tokens by id.
///
/// Whatever a message spells stays text. The format of a model is a version of the chat template,
/// whose name `convert` has found and written into the manifest, and the text of its system block.
public struct ChatFormat: Sendable {
    /// The versions of the chat template that are written here.
    public enum Version: String, CaseIterable, Sendable {
        case v1
        case v1_1 = "v1.1"
        /// The template that the models of v1 had at first: the last turn of the assistant never ends.
        case v1First = "v1-first"
    }

    /// How a prompt ends.
    public enum End: Sendable {
        /// Where the assistant begins its next turn.
        case answer
        /// Within the last message, an answer that is to go on.
        case continuation
        /// After the last message.
        case none
    }

    /// What stands for the day, as in 2026-11-27, in the text of a system block.
    public static let date = "{date}"
    /// The system block of the released models of version v1, for conversations without one.
    public static let v1System = """
        You are Apertus, a helpful assistant created by the SwissAI initiative.
        Knowledge cutoff: 2024-04
        Current date: \(date)
        """

    public let version: Version
    /// The system block of a conversation that has none.
    public let system: String
    private let tokenizer: Tokenizer
    private let bos: Int32?
    let roles: Roles

    /// - Parameters:
    ///   - name: of the version, from the manifest.
    ///   - system: of a conversation that has none; nil for what the released models have. `{date}`
    ///     in it is the day.
    ///   - day: in ISO 8601. A conversation keeps the day of its start, since another one
    ///     invalidates what has been computed of the prompt.
    ///   - tokenizer: of the same model.
    ///   - bos: the id at the front of every prompt, from the config.
    /// - Throws: `ApertusError` if there is no such version, or the tokenizer is none of Apertus'.
    public init(
        _ name: String, system: String? = nil, day: String = ChatFormat.today(),
        tokenizer: Tokenizer, bos: Int32?
    ) throws {
        guard let version = Version(rawValue: name) else {
            throw ApertusError(
                .rejected,
                "the chat template is of form \(beginning(of: name)), and this package writes "
                    + "prompts of the forms v1, v1.1 and v1-first; continue a text without a template, or "
                    + "answer with apertus-mlx, which runs any template")
        }
        let text = system ?? (version != .v1_1 ? Self.v1System : "")
        self.version = version
        self.system = text.replacingOccurrences(of: Self.date, with: day)
        self.tokenizer = tokenizer
        self.bos = bos
        roles = try Roles(tokenizer)
    }

    /// The day by the device's clock and time zone, in ISO 8601.
    public static func today() -> String {
        let calendar = Calendar(identifier: .gregorian)
        let day = calendar.dateComponents([.year, .month, .day], from: Date())
        func digits(_ number: Int?, _ count: Int) -> String {
            let text = String(number ?? 0)
            return String(repeating: "0", count: max(0, count - text.count)) + text
        }
        return "\(digits(day.year, 4))-\(digits(day.month, 2))-\(digits(day.day, 2))"
    }

    /// The token ids of a prompt, with BOS at its front.
    ///
    /// - Parameters:
    ///   - tools: what the model may call.
    ///   - thinks: whether it deliberates before it answers; if not, thoughts of earlier turns are
    ///     left out.
    /// - Throws: `ApertusError`, naming the message that no prompt can be made of.
    public func prompt(
        _ messages: [Message], tools: [ToolDefinition] = [], thinks: Bool = false,
        end: End = .answer
    ) throws -> [Int32] {
        try ToolDefinition.requireDifferentNames(tools)
        var turns = try Turn.read(messages)
        if end == .continuation { try requireAnswer(turns) }
        var writer = PromptWriter(version, encode: tokenizer.encode)
        if let bos { writer.write(bos) }
        if case .system(let text) = turns.first {
            turns.removeFirst()
            writer.enclose(.system, text)
        } else {
            writer.enclose(.system, system)
        }
        let declarations = tools.isEmpty ? " disabled" : "\n" + ToolDefinition.declarations(tools)
        writer.enclose(
            .developer,
            "Deliberation: \(thinks ? "enabled" : "disabled")\nTool Capabilities:\(declarations)")
        writer.write(turns, thinks: thinks)
        var ids = writer.finish()
        if end == .answer { ids.append(Role.assistant.start) }
        if end == .continuation, ids.last == Role.assistant.end { ids.removeLast() }
        return ids
    }

    /// A parser of what the model writes after `prompt`.
    ///
    /// - Parameters:
    ///   - stops: the answer ends before the first of these texts.
    ///   - tools: an answer that is nothing but calls of these is one, though no control token
    ///     says so.
    public func parser(
        after prompt: [Int32], stops: [String] = [], tools: [ToolDefinition] = []
    ) throws -> AnswerParser {
        try AnswerParser(
            tokenizer, roles: roles, stops: stops, isThinking: roles.leavesThoughtOpen(prompt),
            toolNames: tools.map(\.name))
    }

    private func requireAnswer(_ turns: [Turn]) throws {
        if case .assistant(let blocks) = turns.last {
            if case .calls = blocks.last {} else { return }
        }
        throw refusal("messages", "the last one is no text of an assistant that could go on")
    }
}
