import Foundation

#if canImport(Darwin)
    import Darwin
#elseif canImport(Glibc)
    import Glibc
#endif

/// Where the program writes: data to stdout, all else to stderr.
///
/// Names and texts come from strangers' files. On a terminal, and on stderr always, what it would
/// obey is shown as `\u{1b}`; into a pipe or file goes the model's text as it is.
enum Sink {
    /// Write data, as it is unless a terminal reads it.
    static func put(_ text: String) {
        write(isatty(1) == 1 ? printable(text, keeping: "\n\t") : text, to: 1)
    }

    /// Write what `--json` prints: control characters in it are escaped already.
    static func putLine(_ text: String) { write(text + "\n", to: 1) }

    /// Write a line of information.
    static func note(_ text: String, end: String = "\n", keeping kept: String = "") {
        write(printable(text, keeping: kept) + end, to: 2)
    }

    /// `text` with what a terminal obeys, but for `kept`, shown escaped.
    static func printable(_ text: String, keeping kept: String = "") -> String {
        guard text.unicodeScalars.contains(where: isOrder) else { return text }
        var out = String.UnicodeScalarView()
        for scalar in text.unicodeScalars {
            if isOrder(scalar), !kept.unicodeScalars.contains(scalar) {
                out += "\\u{\(String(scalar.value, radix: 16))}".unicodeScalars
            } else {
                out.append(scalar)
            }
        }
        return String(out)
    }

    /// C0, DEL and C1; separators of lines and paragraphs; what turns the order of a line around.
    static func isOrder(_ scalar: Unicode.Scalar) -> Bool {
        switch scalar.value {
        case 0 ..< 0x20, 0x7F ..< 0xA0, 0x2028 ... 0x202E, 0x2066 ... 0x2069: true
        default: false
        }
    }

    /// Ends the program where nobody reads stdout any more; what stderr does not take is lost.
    private static func write(_ text: String, to descriptor: Int32) {
        var bytes = Array(text.utf8)[...]
        while !bytes.isEmpty {
            let count = bytes.withUnsafeBytes { buffer in
                #if canImport(Darwin)
                    Darwin.write(descriptor, buffer.baseAddress, buffer.count)
                #else
                    Glibc.write(descriptor, buffer.baseAddress, buffer.count)
                #endif
            }
            if count < 0, errno == EINTR { continue }
            guard count > 0 else {
                guard descriptor == 1 else { return }
                exit(errno == EPIPE ? 0 : 5)
            }
            bytes = bytes.dropFirst(count)
        }
    }
}
