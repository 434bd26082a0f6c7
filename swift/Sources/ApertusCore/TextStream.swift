/// Turns tokens into text as they come; only whole characters, up to the first stop text.
///
/// The pieces together are the text of all tokens: bytes that are no UTF-8 become U+FFFD, and a
/// character that several tokens share comes with the last of them.
public struct TextStream: Sendable {
    private let tokenizer: Tokenizer
    private let stops: [[UInt8]]
    /// Bytes of a character that is not complete, or of what may become a stop text.
    private var held: [UInt8] = []
    /// Whether a stop text has come, or `finish` was called.
    public private(set) var isStopped = false

    /// - Parameter stops: texts of which the first one to come ends the stream; none is empty.
    public init(_ tokenizer: Tokenizer, stops: [String] = []) throws {
        guard !stops.contains("") else { throw ApertusError(.usage, "a stop text must not be empty") }
        self.tokenizer = tokenizer
        self.stops = stops.map { Array($0.utf8) }
    }

    /// Take the next token; returns the text that is certain now.
    public mutating func push(_ id: Int32) -> String {
        guard !isStopped, !tokenizer.isSpecial(id) else { return "" }
        held += tokenizer.bytes(of: id)
        return release(held.count - incompleteTail(of: held))
    }

    /// Returns what was held back; no token follows.
    public mutating func finish() -> String {
        guard !isStopped else { return "" }
        let text = release(held.count)
        guard !isStopped else { return text }
        isStopped = true
        return text + String(decoding: held, as: UTF8.self)
    }

    /// Text of the first `whole` bytes held, up to a stop text, less what may begin one.
    private mutating func release(_ whole: Int) -> String {
        let found = stops.compactMap { stop -> (end: Int, start: Int)? in
            held[..<whole].firstRange(of: stop).map { ($0.upperBound, $0.lowerBound) }
        }
        if let first = found.min(by: { $0 < $1 }) {
            isStopped = true
            return String(decoding: held[..<first.start], as: UTF8.self)
        }
        let kept = stops.map { overlap(held[..<whole], $0) }.max() ?? 0
        let text = String(decoding: held[..<(whole - kept)], as: UTF8.self)
        held.removeFirst(whole - kept)
        return text
    }

    /// The length of the longest end of `bytes` that begins `stop`.
    private func overlap(_ bytes: ArraySlice<UInt8>, _ stop: [UInt8]) -> Int {
        let longest = min(bytes.count, stop.count - 1)
        return (0 ... longest).last { stop.starts(with: bytes.suffix($0)) } ?? 0
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
