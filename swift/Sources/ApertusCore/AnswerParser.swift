/// Splits what a model writes, id by id, into pieces; control tokens are never text.
///
/// Stop texts end the answer alone; a thought or an argument may well hold one.
public struct AnswerParser: Sendable {
    /// A stop text was found, or `finish` was called; further ids are ignored.
    public private(set) var isStopped = false
    /// The answer has ended, and the last of it are calls that are whole.
    public private(set) var endedWithCalls = false
    /// How many calls were no valid JSON; what the model wrote is text then.
    public private(set) var malformed = 0
    /// The stop text that ended the answer.
    public var stopText: String? { stops.found }

    private let tokenizer: Tokenizer
    private let roles: Roles
    private let names: Set<[UInt8]>
    private let newID: @Sendable () -> String
    private let unbegun: (text: TextStream, stops: StopTexts)
    private var isThinking: Bool
    private var calls = 0
    // Of the part that the last control token opened.
    private var text: TextStream
    private var stops: StopTexts
    private var block: CallScanner?
    private var bare: BareCalls?

    /// Start at the beginning of an answer.
    ///
    /// - Parameters:
    ///   - stops: the answer ends before the first of them.
    ///   - isThinking: the prompt leaves a deliberation open.
    ///   - toolNames: an answer that is nothing but a list of calls of these tools is one, though
    ///     no control token says so. Text is held back while it can still become one.
    ///   - newID: makes the id of a call.
    /// - Throws: `ApertusError` if a stop text is empty.
    package init(
        _ tokenizer: Tokenizer, roles: Roles, stops: [String] = [], isThinking: Bool = false,
        toolNames: [String] = [], newID: @escaping @Sendable () -> String = ToolCall.newID
    ) throws {
        self.tokenizer = tokenizer
        self.roles = roles
        self.isThinking = isThinking
        self.newID = newID
        names = Set(toolNames.map { Array($0.utf8) })
        unbegun = (try TextStream(tokenizer), try StopTexts(stops))
        (text, self.stops) = unbegun
        begin()
    }

    /// Take the next id; returns what is certain now.
    public mutating func push(_ id: Int32) -> [Piece] {
        if isStopped || (id == Role.tools.end && block == nil) { return [] }
        endedWithCalls = false
        let opens = roles.thoughtStarts.contains(id)
        if opens || roles.thoughtEnds.contains(id) {
            let pieces = end()
            isThinking = opens
            begin()
            return pieces
        }
        if id == Role.tools.start {
            let pieces = end()
            begin(CallScanner(index: calls, newID: newID))
            return pieces
        }
        if id == Role.tools.end {
            let pieces = end()
            begin()
            return pieces
        }
        return take(text.push(id))
    }

    /// Returns what was held back; no id follows.
    ///
    /// - Parameter isCut: the model would have gone on.
    public mutating func finish(isCut: Bool = false) -> [Piece] {
        guard !isStopped else { return [] }
        let pieces = end(isCut: isCut, isLast: true)
        isStopped = true
        return pieces
    }

    /// Start the part that a control token opens.
    private mutating func begin(_ scanner: CallScanner? = nil) {
        (text, stops) = unbegun
        block = scanner
        bare = nil
        if !names.isEmpty, scanner == nil {
            bare = BareCalls(CallScanner(index: calls, newID: newID, names: names))
        }
    }

    private mutating func take(_ text: String) -> [Piece] {
        if text.isEmpty { return [] }
        let bytes = Array(text.utf8)
        if var scanner = block {
            block = nil
            let parts = scanner.feed(bytes)
            block = scanner
            return fromBlock(scanner, parts)
        }
        if isThinking { return [.thought(text)] }
        if bare != nil {
            if bare!.take(bytes) { return [] }
            let held = bare!.text
            bare = nil
            return answer(held)
        }
        return answer(bytes)
    }

    private mutating func answer(_ bytes: [UInt8]) -> [Piece] {
        let certain = stops.push(bytes)
        isStopped = stops.isStopped
        return certain.isEmpty ? [] : [.text(String(decoding: certain, as: UTF8.self))]
    }

    /// The pieces of calls, and of a malformed block the rest, as the text it is.
    private mutating func fromBlock(_ scanner: CallScanner, _ parts: [CallPart]) -> [Piece] {
        calls = scanner.index
        let pieces = parts.map { Piece.call($0) }
        guard scanner.hasFailed else { return pieces }
        malformed += 1
        block = nil
        return pieces + take(String(decoding: scanner.rest, as: UTF8.self))
    }

    /// What was held back of a part; a character that is cut is left out.
    private mutating func end(isCut: Bool = false, isLast: Bool = false) -> [Piece] {
        var pieces = isCut ? [] : take(text.finish())
        if var scanner = block {
            endedWithCalls = scanner.isWhole
            let parts = scanner.finish(isCut: isCut)
            pieces += fromBlock(scanner, parts)
        } else if let held = bare {
            if isLast, held.scanner.isWhole {
                endedWithCalls = true
                pieces += fromBlock(held.scanner, held.calls)
            } else {
                pieces += answer(held.text)
            }
        }
        if !isThinking {
            let rest = stops.finish()
            if !rest.isEmpty { pieces.append(.text(String(decoding: rest, as: UTF8.self))) }
        }
        return pieces
    }
}

extension ToolCall {
    private static let letters = Array(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789")

    /// An id that no other call has.
    @Sendable package static func newID() -> String {
        "call_" + String((0 ..< 24).map { _ in letters[Int.random(in: letters.indices)] })
    }
}

/// The beginning of an answer that may turn out to be a list of calls.
private struct BareCalls: Sendable {
    private(set) var scanner: CallScanner
    private(set) var calls: [CallPart] = []
    private(set) var text: [UInt8] = []

    init(_ scanner: CallScanner) { self.scanner = scanner }

    /// Take more of the answer; returns whether it can still become calls.
    mutating func take(_ bytes: [UInt8]) -> Bool {
        text += bytes
        calls += scanner.feed(bytes)
        return !scanner.hasFailed
    }
}
