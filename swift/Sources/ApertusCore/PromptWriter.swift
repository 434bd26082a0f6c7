/// Writes turns one after another; calls, their results and the answer are one assistant's turn.
struct PromptWriter {
    private let version: ChatFormat.Version
    private let encode: (String) -> [Int32]
    private var ids: [Int32] = []
    // Text between two control tokens is encoded as a whole. Bytes, so that nothing is composed.
    private var text: [UInt8] = []

    // Where in an assistant's turn it is.
    private var isAnswering = false
    private var isThinking = false
    private var isInResults = false
    private var hasOpenCalls = false

    init(_ version: ChatFormat.Version, encode: @escaping (String) -> [Int32]) {
        self.version = version
        self.encode = encode
    }

    mutating func write(_ id: Int32) {
        if !text.isEmpty { ids += encode(String(decoding: text, as: UTF8.self)) }
        text = []
        ids.append(id)
    }

    mutating func write(_ text: String) { self.text += text.utf8 }

    mutating func enclose(_ role: Role, _ text: String) {
        write(role.start)
        write(text)
        write(role.end)
    }

    mutating func write(_ turns: [Turn], thinks: Bool) {
        let hasCalls = turns.contains { turn in
            guard case .assistant(let blocks) = turn else { return false }
            return blocks.contains { if case .calls = $0 { true } else { false } }
        }
        for turn in turns {
            switch turn {
            case .system(let text), .user(let text):
                closeTurn()
                enclose(.user, text)
            case .result(let text):
                write(isInResults ? ", " : "[")
                write(text)
                isInResults = true
                hasOpenCalls = false
            case .assistant(let all):
                let blocks = all.filter { if case .thoughts = $0 { thinks } else { true } }
                if !isAnswering { write(Role.assistant.start) }
                isAnswering = true
                // With calls, v1.1 has one list of blocks, to which an empty message adds none.
                if blocks.isEmpty, version != .v1_1 || !hasCalls {
                    write(.response(""), isFirst: true)
                }
                for (index, block) in blocks.enumerated() { write(block, isFirst: index == 0) }
            }
        }
    }

    private mutating func write(_ block: Block, isFirst: Bool) {
        if isInResults { write(version == .v1_1 ? "] " : "]") }
        isInResults = false
        switch block {
        case .thoughts(let text):
            if !isThinking { write(Role.inner.start) }
            isThinking = true
            write(text)
        case .response(let text):
            if isThinking { write(Role.inner.end) }
            isThinking = false
            write(text)
        case .calls(let calls):
            // Calls belong to the thoughts before them, but for the one that hands over the answer.
            let isFinal = calls.count == 1 && calls[0].name == CallResults.finalCall
            if isThinking, isFinal, version == .v1_1 || !isFirst {
                write(Role.inner.end)
                isThinking = false
            }
            let list = calls.map { "{\"\($0.name)\": \($0.arguments)}" }
            enclose(.tools, "[\(list.joined(separator: ", "))]")
            hasOpenCalls = true
        }
    }

    private mutating func closeTurn() {
        if isInResults { write("]") }
        if isAnswering { write(Role.assistant.end) }
        (isAnswering, isThinking, isInResults) = (false, false, false)
    }

    /// All ids; the assistant's turn stays open in v1 while calls have no results, and in the first
    /// template of v1 always.
    mutating func finish() -> [Int32] {
        if isInResults { write("]") }
        let isClosed = version == .v1_1 || (version == .v1 && !hasOpenCalls)
        if isAnswering, isClosed { write(Role.assistant.end) }
        if !text.isEmpty { ids += encode(String(decoding: text, as: UTF8.self)) }
        text = []
        return ids
    }
}
