/// Turns tokens into text as they come; only whole characters, up to the first stop text.
///
/// The pieces together are the text of all tokens: bytes that are no UTF-8 become U+FFFD, and a
/// character that several tokens share comes with the last of them.
public struct TextStream: Sendable {
    private let tokenizer: Tokenizer
    private var stops: StopTexts
    /// Bytes of a character that is not complete.
    private var held: [UInt8] = []
    /// Whether a stop text has come, or `finish` was called.
    public var isStopped: Bool { stops.isStopped }

    /// - Parameter stops: texts of which the first one to come ends the stream; none is empty.
    public init(_ tokenizer: Tokenizer, stops: [String] = []) throws {
        self.tokenizer = tokenizer
        self.stops = try StopTexts(stops)
    }

    /// Take the next token; returns the text that is certain now.
    public mutating func push(_ id: Int32) -> String {
        guard !isStopped, !tokenizer.isSpecial(id) else { return "" }
        held += tokenizer.bytes(of: id)
        let whole = held.count - incompleteTail(of: held)
        let text = String(decoding: held[..<whole], as: UTF8.self)
        held.removeFirst(whole)
        return String(decoding: stops.push(text.utf8), as: UTF8.self)
    }

    /// Returns what was held back; no token follows.
    public mutating func finish() -> String {
        guard !isStopped else { return "" }
        let text = String(decoding: held, as: UTF8.self)
        held = []
        return String(decoding: stops.push(text.utf8) + stops.finish(), as: UTF8.self)
    }
}

/// How many bytes at the end of `bytes` are a character that more bytes could still complete.
private func incompleteTail(of bytes: [UInt8]) -> Int {
    for length in 1 ... 3 where length <= bytes.count {
        let tail = bytes.suffix(length)
        guard let first = tail.first, first & 0xC0 != 0x80 else { continue }
        let needed = first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : first >= 0xC2 ? 2 : 1
        guard needed > length, first < 0xF5 else { return 0 }
        // One that no byte can make right any more is complete: it is U+FFFD.
        let second = tail.dropFirst().first
        let isPossible = second.map { byte in
            switch first {
            case 0xE0: byte >= 0xA0
            case 0xED: byte < 0xA0
            case 0xF0: byte >= 0x90
            case 0xF4: byte < 0x90
            default: true
            }
        }
        return isPossible ?? true ? length : 0
    }
    return 0
}
