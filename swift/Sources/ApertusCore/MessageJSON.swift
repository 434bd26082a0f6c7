import Foundation

extension Message {
    private static let roles = ["system", "developer", "user", "assistant", "tool"]
    // What would change the prompt. Other keys, such as `name` and `refusal`, have no place in it.
    private static let unsupported = ["audio", "function_call", "images", "partial", "prefix"]

    /// Read messages as OpenAI's API writes them.
    ///
    /// - Parameter json: a list of `{role, content, tool_calls, tool_call_id, reasoning_content}`.
    /// - Throws: `ApertusError`, naming what is wrong as `messages[3].tool_call_id`.
    public static func list(json: Data) throws -> [Message] {
        try list(Given.read(json, as: "messages"))
    }

    static func list(_ given: Given) throws -> [Message] {
        try given.list("a list of messages").map { try Message($0) }
    }

    private init(_ message: Given) throws {
        let role = try message["role"]
        guard role.value != nil else { throw role.refuse("is missing") }
        let name = try role.text()
        guard Self.roles.contains(name) else {
            let roles = Self.roles.joined(separator: ", ")
            throw role.refuse("\(beginning(of: name)): expected \(roles)")
        }
        for key in Self.unsupported {
            let given = try message[key]
            if given.isTruthy { throw given.refuse("is not supported") }
        }
        let calls = try message["tool_calls"]
        if calls.isTruthy, name != "assistant" {
            throw calls.refuse("only an assistant makes calls")
        }
        let content = try message["content"]
        switch name {
        case "system": self = .system(try content.joined())
        case "developer": self = .developer(try content.joined())
        case "user": self = .user(try content.joined())
        case "tool":
            let id = try message["tool_call_id"]
            self = .result(try content.joined(), of: id.value == nil ? nil : try id.text())
        default: self = try Self.assistant(message, content, calls)
        }
    }

    private static func assistant(
        _ message: Given, _ content: Given, _ calls: Given
    ) throws -> Message {
        var thoughts = ""
        for key in ["reasoning_content", "reasoning"] {
            let given = try message[key]
            if given.isTruthy, thoughts.isEmpty { thoughts = try given.text() }
        }
        let made = calls.value == nil ? [] : try calls.list().map { try ToolCall($0) }
        guard content.value != nil || !made.isEmpty || !thoughts.isEmpty else {
            throw content.refuse("is missing; only a message with calls or thoughts may have none")
        }
        let text = content.value == nil ? "" : try content.joined()
        return .assistant(text, thoughts: thoughts, calls: made)
    }
}

extension ToolCall {
    fileprivate init(_ call: Given) throws {
        let kind = try call["type"]
        guard kind.value == nil || kind.value?.text == "function" else {
            throw kind.refuse("is not supported; calls are of type 'function'")
        }
        let (id, function) = (try call["id"], try call["function"])
        self.init(
            id: id.value == nil ? nil : try id.text(),
            name: try function["name"].calledName(),
            arguments: try function["arguments"].arguments())
    }
}

extension Given {
    /// A content: a text, or a list of text parts, joined.
    fileprivate func joined() throws -> String {
        if value?.bytes != nil { return try text() }
        if value?.members != nil {
            throw refuse(
                "the structures of a template, {text}, {parts} and {blocks}, are read by apertus-mlx "
                    + "alone; write a text, reasoning_content and tool_calls")
        }
        return try list("a text or a list of text parts").map { part in
            let kind = try part["type"]
            guard kind.value == nil || kind.value?.text == "text" else {
                throw kind.refuse("is not supported; this model reads text only")
            }
            return try part["text"].text()
        }.joined()
    }

    /// The arguments of a call; what is JSON in a text stays to the letter.
    fileprivate func arguments() throws -> String {
        if let text = value?.text { return text.isEmpty ? "{}" : text }
        guard value != nil else { return "{}" }
        return try data().written
    }
}
