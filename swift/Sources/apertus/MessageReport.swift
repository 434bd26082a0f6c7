import ApertusKit

extension Message {
    /// As OpenAI's API writes it, to go on from.
    var report: Report {
        switch self {
        case .system(let text): Self.object("system", .text(text))
        case .developer(let text): Self.object("developer", .text(text))
        case .user(let text): Self.object("user", .text(text))
        case .result(let text, let id):
            Self.object("tool", .text(text), id.map { [("tool_call_id", .text($0))] } ?? [])
        case .assistant(let text, let thoughts, let calls):
            Self.object(
                "assistant", text.isEmpty && !(calls.isEmpty && thoughts.isEmpty) ? .null : .text(text),
                (thoughts.isEmpty ? [] : [("reasoning_content", .text(thoughts))])
                    + (calls.isEmpty ? [] : [("tool_calls", .list(calls.map(\.report)))]))
        }
    }

    private static func object(
        _ role: String, _ content: Report, _ more: [(String, Report)] = []
    ) -> Report {
        .object([("role", .text(role)), ("content", content)] + more)
    }
}

extension ToolCall {
    fileprivate var report: Report {
        let function = Report.object([("name", .text(name)), ("arguments", .text(arguments))])
        let id: [(String, Report)] = id.map { [("id", .text($0))] } ?? []
        return .object(id + [("type", .text("function")), ("function", function)])
    }
}
