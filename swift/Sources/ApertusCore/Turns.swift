/// A part of an assistant's turn.
enum Block: Equatable {
    case thoughts(String)
    case response(String)
    case calls([ToolCall])
}

/// A checked message.
enum Turn: Equatable {
    case system(String)
    case user(String)
    case assistant([Block])
    case result(String)

    /// The turns of a conversation: results in the order of their calls, one system turn in front.
    ///
    /// It may end with calls that have no result yet.
    ///
    /// - Throws: `ApertusError`, naming what is wrong by its place, as `messages[3].tool_call_id`.
    static func read(_ messages: [Message]) throws -> [Turn] {
        var turns: [Turn] = []
        var results: CallResults?
        for (index, message) in messages.enumerated() {
            let place = "messages[\(index)]"
            if case .result(let text, let id) = message {
                guard results != nil else {
                    let words = "a result follows the assistant's message with its call"
                    throw refusal("\(place).role", words)
                }
                try results!.add(text, of: id, at: place)
                continue
            }
            turns += try results?.inOrder(atEnd: false).map { .result($0) } ?? []
            results = nil
            switch message {
            case .system(let text), .developer(let text):
                if turns.isEmpty {
                    turns = [.system(text)]
                } else if turns.count == 1, case .system(let first) = turns[0] {
                    turns = [.system("\(first)\n\n\(text)")]
                } else {
                    turns.append(.user(text))
                }
            case .user(let text):
                turns.append(.user(text))
            case .assistant(let text, let thoughts, let calls):
                let blocks: [Block] = [.thoughts(thoughts), .response(text), .calls(calls)]
                turns.append(.assistant(blocks.filter { !$0.isEmpty }))
                if !calls.isEmpty { results = try CallResults(calls, at: place) }
            case .result:
                break
            }
        }
        return turns + (try results?.inOrder(atEnd: true).map { .result($0) } ?? [])
    }
}

extension Block {
    fileprivate var isEmpty: Bool {
        switch self {
        case .thoughts(let text), .response(let text): text.isEmpty
        case .calls(let calls): calls.isEmpty
        }
    }
}

/// The results of one message's calls, which may come in any order; the chat format has no ids.
struct CallResults {
    /// After thoughts this call hands over the final answer; no result follows it.
    static let finalCall = "display_answers"

    private let place: String
    private let calls: [ToolCall]
    private let hasIDs: Bool
    private var found: [Int: (text: String, place: String)] = [:]
    // By its bytes: a `String` equals another of the same meaning in other characters.
    private var indices: [[UInt8]: Int] = [:]

    init(_ calls: [ToolCall], at place: String) throws {
        self.place = place
        self.calls = calls
        hasIDs = calls.contains { $0.id != nil }
        for (index, call) in calls.enumerated() {
            let field = "\(place).tool_calls[\(index)]"
            guard isCalledName(call.name.utf8) else {
                throw refusal("\(field).function.name", calledNameRule)
            }
            try requireArguments(call.arguments, at: "\(field).function.arguments")
            guard hasIDs else { continue }
            guard let id = call.id else {
                let words = "is missing; either all calls of a message have one or none has"
                throw refusal("\(field).id", words)
            }
            guard indices.updateValue(index, forKey: Array(id.utf8)) == nil else {
                let words = "\(beginning(of: id)) is also the id of an earlier call"
                throw refusal("\(field).id", words)
            }
        }
    }

    mutating func add(_ text: String, of id: String?, at message: String) throws {
        if hasIDs {
            found[try find(id, at: message)] = (text, message)
            return
        }
        if id != nil {
            throw refusal("\(message).tool_call_id", "the calls of \(place) have no ids")
        }
        guard found.count < calls.count else {
            throw refusal("\(message).role", "there are only \(calls.count) calls in \(place)")
        }
        found[found.count] = (text, message)
    }

    private func find(_ id: String?, at message: String) throws -> Int {
        let field = "\(message).tool_call_id"
        guard let id else {
            throw refusal(field, "is missing; it says which call of \(place) this answers")
        }
        guard let index = indices[Array(id.utf8)] else {
            throw refusal(field, "\(beginning(of: id)) is the id of no call of \(place)")
        }
        if let earlier = found[index] {
            throw refusal(field, "\(beginning(of: id)) has its result already, \(earlier.place)")
        }
        return index
    }

    /// The results in the order of their calls; calls with which a conversation ends need none yet.
    func inOrder(atEnd: Bool) throws -> [String] {
        if found.isEmpty, atEnd || !ToolCall.needResults(calls) { return [] }
        return try calls.indices.map { index in
            if let result = found[index] { return result.text }
            let field = hasIDs ? "tool_calls[\(index)].id" : "tool_calls[\(index)]"
            throw refusal("\(place).\(field)", "has no result; it needs a message of role 'tool'")
        }
    }
}

extension ToolCall {
    /// Whether results follow these calls of one message.
    package static func needResults(_ calls: [ToolCall]) -> Bool {
        calls.contains { $0.name != CallResults.finalCall }
    }
}

let calledNameRule = "expected 1 to 64 characters without quotes or controls"

/// Whether a call may have this name. A model may call what is no function, such as `functions.f`, which
/// prompts then write as it is.
func isCalledName(_ name: some Collection<UInt8>) -> Bool {
    let text = String(decoding: name, as: UTF8.self).unicodeScalars
    return (1 ... 64).contains(text.count)
        && text.allSatisfy { $0 != "\"" && $0 != "\\" && $0.value >= 0x20 && $0.value != 0x7F }
}

let functionNameRule = "expected 1 to 64 of the characters a-z A-Z 0-9 _ -"

func isFunctionName(_ name: String) -> Bool {
    (1 ... 64).contains(name.utf8.count)
        && name.utf8.allSatisfy { byte in
            switch byte {
            case 0x30 ... 0x39, 0x41 ... 0x5A, 0x61 ... 0x7A, 0x5F, 0x2D: true
            default: false
            }
        }
}

private func requireArguments(_ text: String, at place: String) throws {
    do {
        guard case .object = try JSON(text.utf8, uniqueKeys: false, halves: true) else {
            throw refusal(place, "expected an object in JSON")
        }
    } catch let error as JSON.Malformed {
        throw refusal(place, "is not valid JSON (\(error))")
    }
}

/// What is wrong with a value that the caller gave.
func refusal(_ place: String, _ words: String) -> ApertusError {
    ApertusError(.usage, "\(place): \(words)")
}

/// The beginning of a text, on one line.
func beginning(of text: String) -> String {
    String(text.prefix(64)).debugDescription
}
