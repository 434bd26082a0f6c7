import ApertusCore
import Foundation

/// What a tool gave back.
public struct ToolResult: Sendable, Equatable {
    /// `ToolCall.id` of the call that it answers.
    public var callID: String?
    /// As the model is to read it.
    public var text: String

    /// The result of the call with this id; without one, of the next call.
    public init(of callID: String?, text: String) { (self.callID, self.text) = (callID, text) }
}

/// Messages so far; every turn reads only what is new of them.
///
/// Any thread may use it. Answers of one model are computed one at a time: a second `ask` waits
/// until the first is over, in the order in which they came, also across conversations.
///
/// Keys and values are kept of the prompt that was computed last; a conversation that goes on after
/// another one has been answered is read again from where the two differ.
public final class Conversation: Sendable {
    private struct State {
        var messages: [Message]
        var thinks: Bool
        var last: Outcome?
        var format: ChatFormat?
    }

    private let engine: Engine
    private let state: Locked<State>
    /// What the model may call.
    public let tools: [ToolDefinition]

    init(_ engine: Engine, system: String?, thinks: Bool, tools: [ToolDefinition]) {
        self.engine = engine
        self.tools = tools
        state = Locked(State(messages: system.map { [.system($0)] } ?? [], thinks: thinks))
    }

    /// All messages so far: what to keep, to go on with the conversation another day.
    ///
    /// A question and its answer are there once the answer is over.
    public var messages: [Message] {
        get { state.with { $0.messages } }
        set { state.with { $0.messages = newValue } }
    }

    /// Whether the model deliberates before it answers.
    public var thinks: Bool {
        get { state.with { $0.thinks } }
        set { state.with { $0.thinks = newValue } }
    }

    /// What the latest answer produced and took, as far as it went.
    public var lastOutcome: Outcome? { state.with { $0.last } }

    /// Add a user's turn and answer it.
    ///
    /// The answer is computed whether or not anybody reads it; ending the task that reads it, or
    /// its loop, ends the answer behind the next token, or part of the prompt. What was said until
    /// then stays in the conversation.
    ///
    /// - Parameter onPrefill: is told how many tokens of the prompt are done, on the thread of MLX.
    /// - Returns: text, thoughts and calls as they become certain. It throws `ApertusError`: of
    ///   kind `usage`, when the conversation does not fit the context any more, `rejected`, when
    ///   the chat
    ///   template is of an unknown form, `resource`, when memory ran short. After `usage` and
    ///   `rejected` the conversation is as it was.
    public func ask(
        _ question: String, options: AnswerOptions = .init(),
        onPrefill: (@Sendable (Int) -> Void)? = nil
    ) -> AsyncThrowingStream<Piece, any Error> {
        answer(options, onPrefill) { $0 + [.user(question)] }
    }

    /// Give the model what its tools gave, and have it go on; see `ask`.
    public func answer(
        with results: [ToolResult], options: AnswerOptions = .init(),
        onPrefill: (@Sendable (Int) -> Void)? = nil
    ) -> AsyncThrowingStream<Piece, any Error> {
        answer(options, onPrefill) { $0 + results.map { .result($0.text, of: $0.callID) } }
    }

    /// Answer the last question again, without reading it again; see `ask`.
    public func retry(
        options: AnswerOptions = .init(), onPrefill: (@Sendable (Int) -> Void)? = nil
    ) -> AsyncThrowingStream<Piece, any Error> {
        answer(options, onPrefill) { messages in
            guard let turn = Self.lastQuestion(messages) else {
                throw ApertusError(.usage, "there is nothing to retry")
            }
            return Array(messages[...turn])
        }
    }

    /// The system message that the conversation begins with.
    public var system: String? {
        get { state.with { Self.system($0.messages) } }
        set {
            state.with { state in
                let rest = state.messages.dropFirst(Self.system(state.messages) == nil ? 0 : 1)
                state.messages = (newValue.map { [.system($0)] } ?? []) + rest
            }
        }
    }

    /// Forget all but the system message.
    public func reset() {
        state.with { state in
            state.messages = Array(state.messages.prefix(Self.system(state.messages) == nil ? 0 : 1))
            state.last = nil
        }
    }

    /// Go on from `messages` instead of those so far.
    ///
    /// - Throws: `ApertusError`: the chat format has no place for them, or they do not fit the
    ///   context; the conversation stays as it was.
    public func load(_ messages: [Message]) throws {
        let thinks = thinks
        let ids = try format().prompt(messages, tools: tools, thinks: thinks)
        try engine.requireRoom(ids.count)
        state.with { ($0.messages, $0.last) = (messages, nil) }
    }

    /// The calls that the last message makes, and that wait for their results.
    public var openCalls: [ToolCall] {
        guard case .assistant(_, _, let calls) = messages.last else { return [] }
        return ToolCall.needResults(calls) ? calls : []
    }

    /// Forget the last question and what follows it.
    ///
    /// - Returns: whether there was one.
    @discardableResult
    public func undo() -> Bool {
        state.with { state in
            guard let turn = Self.lastQuestion(state.messages) else { return false }
            state.messages.removeSubrange(turn...)
            return true
        }
    }

    /// How many messages are the user's.
    public var questions: Int {
        messages.count { if case .user = $0 { true } else { false } }
    }

    private static func system(_ messages: [Message]) -> String? {
        switch messages.first {
        case .system(let text), .developer(let text): text
        default: nil
        }
    }

    private static func lastQuestion(_ messages: [Message]) -> Int? {
        messages.lastIndex { if case .user = $0 { true } else { false } }
    }

    /// Answer after the messages that `change` makes of those so far.
    private func answer(
        _ options: AnswerOptions, _ onPrefill: (@Sendable (Int) -> Void)?,
        _ change: @escaping @Sendable ([Message]) throws -> [Message]
    ) -> AsyncThrowingStream<Piece, any Error> {
        let asked = Locked<[Message]>([])
        return engine.stream(
            options: options, onPrefill: onPrefill,
            begin: { [self] in
                let (messages, thinks) = state.with { ($0.messages, $0.thinks) }
                let changed = try change(messages)
                let format = try format()
                let ids = try format.prompt(changed, tools: tools, thinks: thinks)
                try engine.requireRoom(ids.count)
                asked.with { $0 = changed }
                return Ask.Prompt(
                    ids: ids,
                    parser: try format.parser(after: ids, stops: options.stops, tools: tools))
            },
            end: { [self] outcome in
                state.with { state in
                    state.messages = asked.with { $0 } + [outcome.message]
                    state.last = outcome
                }
            })
    }

    /// Made once: a conversation keeps the day of its first question.
    private func format() throws -> ChatFormat {
        if let format = state.with({ $0.format }) { return format }
        let made = try engine.folder.chatFormat()
        state.with { $0.format = made }
        return made
    }
}

extension Engine {
    /// An answer that begins when its turn has come, as a stream that ends it when it is cancelled.
    nonisolated func stream(
        options: AnswerOptions, onPrefill: (@Sendable (Int) -> Void)?,
        begin: @escaping @Sendable () throws -> Ask.Prompt,
        end: @escaping @Sendable (Outcome) -> Void
    ) -> AsyncThrowingStream<Piece, any Error> {
        AsyncThrowingStream { continuation in
            let ask = Ask(
                options: options, onPrefill: onPrefill, begin: begin, end: end,
                continuation: continuation)
            continuation.onTermination = { reason in
                if case .cancelled = reason { ask.stop(.cancelled) }
            }
            enqueue(ask)
        }
    }
}
