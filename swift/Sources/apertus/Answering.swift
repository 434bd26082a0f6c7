import ApertusKit

/// Writes an answer as it comes: its text and a newline to stdout, the deliberation to stderr.
///
/// A tool call is a line of its own: the tool's name, a blank, the arguments.
struct AnswerPrinter {
    private var isThinking = false
    private var isInCall = false
    private var isOpen = false

    mutating func print(_ piece: Piece) {
        if case .thought(let text) = piece {
            isThinking = true
            Sink.note(text, end: "", keeping: "\n\t")
            return
        }
        endThought()
        var text = piece.text
        var begins = isInCall
        isInCall = false
        if case .call(let part) = piece {
            text = (part.name.map { "\($0) " } ?? "") + part.arguments
            // Between the tokens of JSON a line break says what a blank says.
            text = String(text.map { $0.isNewline ? " " : $0 })
            begins = part.id != nil
            isInCall = true
        }
        if begins, isOpen { text = "\n" + text }
        Sink.put(text)
        isOpen = true
    }

    /// The newline behind what there was.
    mutating func finish() {
        endThought()
        Sink.put("\n")
        (isOpen, isInCall) = (false, false)
    }

    private mutating func endThought() {
        if isThinking { Sink.note("") }
        isThinking = false
    }
}

extension Outcome {
    /// One line about what a run took.
    var summary: String {
        let reused = reusedPromptTokens > 0 ? " (\(reusedPromptTokens) reused)" : ""
        return "prompt \(counted(promptTokenIDs.count, "token"))\(reused), "
            + "\(rounded(prefillTokensPerSecond, 1)) tokens/s; "
            + "answer \(counted(tokenIDs.count, "token")), "
            + "\(rounded(decodeTokensPerSecond, 1)) tokens/s; "
            + "first token after \(rounded(secondsToFirstToken, 2)) s; "
            + "peak memory \(formatBytes(peakMemory))"
    }
}

func counted(_ count: Int, _ noun: String) -> String { "\(count) \(noun)\(count == 1 ? "" : "s")" }

/// A number with so many decimal places.
func rounded(_ number: Double, _ places: Int) -> String {
    var scale = 1.0
    for _ in 0 ..< places { scale *= 10 }
    let text = "\((number * scale).rounded() / scale)"
    let digits = text.split(separator: ".").last.map(\.count) ?? 0
    return text + String(repeating: "0", count: max(0, places - digits))
}
