/// One message of a conversation.
public enum Message: Codable, Equatable, Sendable {
    /// What the model is to be and do. Those at the front become one, later ones turns of the user.
    case system(String)
    /// The same as `system`; OpenAI's newer name for it.
    case developer(String)
    case user(String)
    /// What the model answered: its text, the thoughts before it, and the calls at its end.
    case assistant(String, thoughts: String = "", calls: [ToolCall] = [])
    /// The result of the call with this id, as the tool wrote it; without an id, of the next call.
    case result(String, of: String?)
}

/// A tool that the model asks for.
public struct ToolCall: Codable, Equatable, Sendable {
    /// What a result refers to. Either all calls of a message have one or none has.
    public let id: String?
    /// Of the tool, as the model wrote it.
    public let name: String
    /// A JSON object as the model wrote it; cut where the answer was cut.
    public let arguments: String

    /// Make a call, such as one of a conversation that was kept.
    public init(id: String?, name: String, arguments: String) {
        self.id = id
        self.name = name
        self.arguments = arguments
    }
}
