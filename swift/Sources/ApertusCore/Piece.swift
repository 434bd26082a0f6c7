/// What has become certain of a model's answer, as it comes.
public enum Piece: Equatable, Sendable {
    /// Of the answer.
    case text(String)
    /// Of the deliberation before it.
    case thought(String)
    /// A part of a call.
    case call(CallPart)

    /// The text of the answer in it; empty for a thought or a call.
    public var text: String { if case .text(let text) = self { text } else { "" } }
}

/// A part of one tool call: the first has its id and name, those that follow more of the arguments.
public struct CallPart: Equatable, Sendable {
    /// Which call of the answer, counted from 0; calls come one after another.
    public let index: Int
    /// What a result refers to, unique for ever; only in the first part.
    public var id: String?
    /// Of the tool, as the model wrote it; only in the first part.
    public var name: String?
    /// JSON text, exactly as the model wrote it.
    public var arguments = ""
    /// What came of this call is no call, and no part of the answer: the model went on with
    /// something malformed. All of it follows as text.
    public var isWithdrawn = false
}

/// An answer as its pieces make it up.
public struct Answer: Equatable, Sendable {
    public private(set) var text = ""
    public private(set) var thoughts = ""
    private var parts: [(index: Int, call: ToolCall)] = []

    /// The calls in it; the last one's arguments are cut where the answer was cut.
    public var calls: [ToolCall] { parts.map(\.call) }

    /// Start with nothing.
    public init() {}

    /// Take the next piece.
    public mutating func add(_ piece: Piece) {
        switch piece {
        case .text(let more): text += more
        case .thought(let more): thoughts += more
        case .call(let part):
            let earlier = parts.last?.index == part.index ? parts.removeLast().call : nil
            guard !part.isWithdrawn else { return }
            let call = ToolCall(
                id: earlier?.id ?? part.id, name: earlier?.name ?? part.name ?? "",
                arguments: (earlier?.arguments ?? "") + part.arguments)
            parts.append((part.index, call))
        }
    }

    /// The message that goes on with a conversation.
    public var message: Message { .assistant(text, thoughts: thoughts, calls: calls) }

    public static func == (one: Answer, other: Answer) -> Bool {
        one.text == other.text && one.thoughts == other.thoughts && one.calls == other.calls
    }
}
