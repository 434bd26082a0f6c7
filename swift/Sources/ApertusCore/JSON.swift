/// JSON as RFC 8259 has it, with keys and texts as UTF-8 bytes, keys in order.
///
/// Foundation's readers put keys into dictionaries of `String`, where canonically equivalent texts
/// are one key ("é" in its two spellings); a vocabulary must not lose entries to that.
package indirect enum JSON: Equatable, Sendable {
    case object([Member])
    case array([JSON])
    case string([UInt8])
    /// The digits as they stand there.
    case number(String)
    case bool(Bool)
    case null

    package struct Member: Equatable, Sendable {
        package let key: [UInt8]
        package let value: JSON
    }

    /// Why some bytes are no JSON, and where.
    package struct Malformed: Error, Equatable, CustomStringConvertible {
        let reason: String
        let offset: Int
        package var description: String { "\(reason) at byte \(offset)" }
    }

    /// No file of a model nests deeper.
    static let deepest = 64
    static let tooDeep = "nested too deeply"
    /// Python reads no longer integers from a file, since converting them takes the square of the time.
    static let mostDigits = 4300

    /// Read all of `bytes`.
    ///
    /// - Parameters:
    ///   - uniqueKeys: whether a key that stands twice in an object is an error. Telling takes time
    ///     that a vocabulary does not need.
    ///   - halves: whether a text may hold an escaped half of a surrogate pair, as RFC 8259 lets it;
    ///     its three bytes are no UTF-8. And whether integers may have more than 4,300 digits: both is
    ///     so in what a model writes.
    /// - Throws: `Malformed`.
    package init(
        _ bytes: some Collection<UInt8>, uniqueKeys: Bool = true, halves: Bool = false
    ) throws(Malformed) {
        var reader = Reader(bytes: Array(bytes), uniqueKeys: uniqueKeys, halves: halves)
        self = try reader.value(depth: 0)
        reader.skipBlanks()
        guard reader.at == reader.bytes.count else { throw reader.malformed("text after the end") }
    }

    package subscript(key: String) -> JSON? {
        guard case .object(let members) = self else { return nil }
        let wanted = Array(key.utf8)
        return members.last { $0.key == wanted }?.value
    }
    package var members: [Member]? { if case .object(let members) = self { members } else { nil } }
    package var items: [JSON]? { if case .array(let items) = self { items } else { nil } }
    package var bytes: [UInt8]? { if case .string(let bytes) = self { bytes } else { nil } }
    package var text: String? { bytes.map { String(decoding: $0, as: UTF8.self) } }
    package var double: Double? {
        guard case .number(let digits) = self, let number = Double(digits), number.isFinite else {
            return nil
        }
        return number
    }
    package var int: Int? { if case .number(let digits) = self { Int(digits) } else { nil } }
    package var flag: Bool? { if case .bool(let flag) = self { flag } else { nil } }
    package var isNull: Bool { self == .null }
}

private struct Reader {
    let bytes: [UInt8]
    let uniqueKeys: Bool
    let halves: Bool
    var at = 0

    func malformed(_ reason: String) -> JSON.Malformed { .init(reason: reason, offset: at) }

    var next: UInt8? { at < bytes.count ? bytes[at] : nil }

    mutating func skipBlanks() {
        while let byte = next, byte == 0x20 || byte == 0x0A || byte == 0x0D || byte == 0x09 { at += 1 }
    }

    mutating func take(_ character: Unicode.Scalar) -> Bool {
        skipBlanks()
        guard next == UInt8(ascii: character) else { return false }
        at += 1
        return true
    }

    mutating func value(depth: Int) throws(JSON.Malformed) -> JSON {
        skipBlanks()
        if depth == JSON.deepest, next == UInt8(ascii: "{") || next == UInt8(ascii: "[") {
            throw malformed(JSON.tooDeep)
        }
        switch next {
        case UInt8(ascii: "{"): return try object(depth: depth)
        case UInt8(ascii: "["): return try array(depth: depth)
        case UInt8(ascii: "\""): return .string(try string())
        case UInt8(ascii: "t"): return try word("true", .bool(true))
        case UInt8(ascii: "f"): return try word("false", .bool(false))
        case UInt8(ascii: "n"): return try word("null", .null)
        case nil: throw malformed("ends too soon")
        default: return try number()
        }
    }

    mutating func object(depth: Int) throws(JSON.Malformed) -> JSON {
        at += 1
        var members: [JSON.Member] = []
        var seen: Set<[UInt8]> = []
        if take("}") { return .object(members) }
        repeat {
            skipBlanks()
            guard next == UInt8(ascii: "\"") else { throw malformed("no key") }
            let key = try string()
            if uniqueKeys, !seen.insert(key).inserted { throw malformed("a key that stands twice") }
            guard take(":") else { throw malformed("no colon") }
            members.append(.init(key: key, value: try value(depth: depth + 1)))
        } while take(",")
        guard take("}") else { throw malformed("no end of an object") }
        return .object(members)
    }

    mutating func array(depth: Int) throws(JSON.Malformed) -> JSON {
        at += 1
        var items: [JSON] = []
        if take("]") { return .array(items) }
        repeat { items.append(try value(depth: depth + 1)) } while take(",")
        guard take("]") else { throw malformed("no end of an array") }
        return .array(items)
    }

    mutating func word(_ text: StaticString, _ value: JSON) throws(JSON.Malformed) -> JSON {
        let word = text.withUTF8Buffer { Array($0) }
        guard bytes[at...].starts(with: word) else { throw malformed("not a value") }
        at += word.count
        return value
    }

    mutating func number() throws(JSON.Malformed) -> JSON {
        let start = at
        func digits() -> Bool {
            let from = at
            while let byte = next, (0x30 ... 0x39).contains(byte) { at += 1 }
            return at > from
        }
        if next == UInt8(ascii: "-") { at += 1 }
        let whole = at
        if next == UInt8(ascii: "0") {
            at += 1
        } else if !digits() {
            throw malformed("not a value")
        }
        let hasPoint = next == UInt8(ascii: ".")
        if hasPoint {
            at += 1
            guard digits() else { throw malformed("no digit after the point") }
        }
        let isInteger = next != UInt8(ascii: "e") && next != UInt8(ascii: "E") && !hasPoint
        if isInteger, !halves, at - whole > JSON.mostDigits {
            throw malformed("an integer of more than \(JSON.mostDigits) digits")
        }
        if next == UInt8(ascii: "e") || next == UInt8(ascii: "E") {
            at += 1
            if next == UInt8(ascii: "+") || next == UInt8(ascii: "-") { at += 1 }
            guard digits() else { throw malformed("no digit in the exponent") }
        }
        return .number(String(decoding: bytes[start ..< at], as: UTF8.self))
    }

    mutating func string() throws(JSON.Malformed) -> [UInt8] {
        at += 1
        let start = at
        var out: [UInt8] = []
        while let byte = next, byte != UInt8(ascii: "\"") {
            guard byte >= 0x20 else { throw malformed("a control character in a text") }
            at += 1
            if byte == UInt8(ascii: "\\") {
                try escape(into: &out)
            } else {
                out.append(byte)
            }
        }
        guard next != nil else { throw malformed("no end of a text") }
        guard halves || String(validating: out, as: UTF8.self) != nil else {
            at = start
            throw malformed("a text that is no UTF-8")
        }
        at += 1
        return out
    }

    mutating func escape(into out: inout [UInt8]) throws(JSON.Malformed) {
        let letter = next
        at += 1
        switch letter {
        case UInt8(ascii: "n"): out.append(0x0A)
        case UInt8(ascii: "r"): out.append(0x0D)
        case UInt8(ascii: "t"): out.append(0x09)
        case UInt8(ascii: "b"): out.append(0x08)
        case UInt8(ascii: "f"): out.append(0x0C)
        case UInt8(ascii: "\""), UInt8(ascii: "\\"), UInt8(ascii: "/"): out.append(letter!)
        case UInt8(ascii: "u"):
            var code = try hex()
            if (0xD800 ..< 0xDC00).contains(code), bytes[at...].starts(with: "\\u".utf8) {
                let second = at
                at += 2
                let low = try hex()
                if (0xDC00 ..< 0xE000).contains(low) {
                    code = 0x10000 + (code - 0xD800) << 10 + (low - 0xDC00)
                } else {
                    at = second
                }
            }
            if let scalar = Unicode.Scalar(code) {
                out.append(contentsOf: UTF8.encode(scalar)!)
            } else if halves {
                let bytes = [0xE0 | code >> 12, 0x80 | code >> 6 & 63, 0x80 | code & 63]
                out += bytes.map { UInt8($0) }
            } else {
                throw malformed("half a character")
            }
        default: throw malformed("an unknown escape")
        }
    }

    mutating func hex() throws(JSON.Malformed) -> UInt32 {
        guard at + 4 <= bytes.count else { throw malformed("ends too soon") }
        var code: UInt32 = 0
        for byte in bytes[at ..< at + 4] {
            guard let digit = Character(Unicode.Scalar(byte)).hexDigitValue else {
                throw malformed("not a hexadecimal digit")
            }
            code = code << 4 | UInt32(digit)
        }
        at += 4
        return code
    }
}
