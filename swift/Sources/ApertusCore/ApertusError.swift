/// What went wrong, where, and what to do about it; the only error that this package throws.
public struct ApertusError: Error, Sendable, Equatable, CustomStringConvertible {
    /// The kinds are those of `apertus-mlx`, whose exit codes they have.
    public enum Kind: Int32, Sendable {
        /// This package is at fault.
        case bug = 1
        /// The caller asked for what cannot be.
        case usage = 2
        /// A file is damaged, or of a form that is not supported.
        case rejected = 3
        /// Something is not there.
        case notFound = 4
        /// Too little memory or disk.
        case resource = 5
        /// Someone ended it.
        case cancelled = 130
    }

    public let kind: Kind
    /// One line: the file, tensor or key, what is wrong with it, and the way out.
    public let description: String

    /// An error of this kind, in one line.
    public init(_ kind: Kind, _ description: String) {
        self.kind = kind
        self.description = description
    }
}
