/// Finds the end of a JSON string in a text that comes in parts; begins after its quote.
struct JSONStringEnd: Sendable {
    /// The quote that ends it has been read.
    private(set) var isClosed = false
    private var isEscaped = false
    private var content: [UInt8] = []

    /// Go on at `start`; returns where the string, or the text, ends.
    mutating func read(_ text: [UInt8], _ start: Int) -> Int {
        var at = start
        while at < text.count, !isClosed {
            if isEscaped {
                isEscaped = false
            } else {
                isEscaped = text[at] == UInt8(ascii: "\\")
                isClosed = text[at] == UInt8(ascii: "\"")
            }
            at += 1
        }
        content += text[start ..< (isClosed ? at - 1 : at)]
        return at
    }

    /// What it says, in UTF-8; of a string that is not closed, the characters that are whole.
    ///
    /// Nil if it is no valid JSON, or no text.
    func value() -> [UInt8]? {
        var text = content
        if !isClosed { text.removeLast(Self.begunEscape(text)) }
        let quote = UInt8(ascii: "\"")
        guard case .string(var value)? = try? JSON([quote] + text + [quote], halves: true) else {
            return nil
        }
        let end = Array(value.suffix(3))
        // The first half of a pair, whose second may follow.
        if !isClosed, end.count == 3, end[0] == 0xED, end[1] & 0xF0 == 0xA0 { value.removeLast(3) }
        return String(validating: value, as: UTF8.self) == nil ? nil : value
    }

    /// How many bytes at the end are an escape that is not complete.
    private static func begunEscape(_ text: [UInt8]) -> Int {
        let isDigit = { (byte: UInt8) in Character(Unicode.Scalar(byte)).isHexDigit }
        let digits = text.reversed().prefix(3).prefix(while: isDigit).count
        let isUnicode = text.dropLast(digits).last == UInt8(ascii: "u")
        let length = isUnicode ? digits + 2 : 1
        let slashes = text.dropLast(length - 1).reversed().prefix { $0 == UInt8(ascii: "\\") }.count
        return slashes % 2 == 1 ? length : 0
    }
}

/// Finds the end of a JSON object: brackets and strings, not yet whether it is valid.
struct JSONObjectEnd: Sendable {
    /// A bracket closes another kind, or they are nested too deeply.
    private(set) var isWrong = false
    /// Whether all brackets so far are closed.
    var isClosed: Bool { open.isEmpty }
    private var open: [UInt8] = []
    private var isInString = false
    private var isEscaped = false

    /// Go on at `start`; returns where the object ends, or what is wrong, or the text.
    mutating func read(_ text: [UInt8], _ start: Int) -> Int {
        var at = start
        while at < text.count {
            let byte = text[at]
            at += 1
            if isInString {
                if isEscaped {
                    isEscaped = false
                } else {
                    isEscaped = byte == UInt8(ascii: "\\")
                    isInString = byte != UInt8(ascii: "\"")
                }
                continue
            }
            switch byte {
            case UInt8(ascii: "\""): isInString = true
            case UInt8(ascii: "{"), UInt8(ascii: "["):
                open.append(byte)
                isWrong = open.count > JSON.deepest
            case UInt8(ascii: "}"): isWrong = open.popLast() != UInt8(ascii: "{")
            case UInt8(ascii: "]"): isWrong = open.popLast() != UInt8(ascii: "[")
            default: continue
            }
            if isWrong || open.isEmpty { return at }
        }
        return at
    }
}

func isBlank(_ byte: UInt8) -> Bool {
    byte == 0x20 || byte == 0x09 || byte == 0x0A || byte == 0x0D
}

/// Whether a text is a JSON object with unique keys, no deeper than `JSON.deepest`.
func isJSONObject(_ text: [UInt8]) -> Bool {
    guard case .object? = try? JSON(text, halves: true) else { return false }
    return true
}
